"""LongLLMLingua: passages from which the question is easy to guess, and words that the question makes so."""

from dataclasses import dataclass

import torch

from longfit.compressors.prompt.base import Question
from longfit.compressors.prompt.llmlingua import LLMLingua, passages
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import Unit
from longfit.errors import InputError

RESTRICTION = " We can get the answer to this question in the given documents."


@dataclass
class LongLLMLingua(LLMLingua):
    """`LLMLingua` for a question.

    Passages are ranked by how likely the question is after them; a passage keeps the more the higher it ranks; a word's
    score is how much its loss falls when the question stands before the text.

    Source: Jiang et al. 2024, "LongLLMLingua" (equations 2 to 5): r_k = −log p(question, restriction | passage) per
    token, contrastive perplexity, and dynamic ratios.

    Deviations: those of `LLMLingua`; passages stay in the order of the text (the paper may reorder them by rank);
    subsequence recovery is not needed, since every kept token knows its place in the source.

    Attributes (options):
        ratio_spread: how much more than the average the first passage keeps, and the last one less.
    """

    name = "longllmlingua"
    source = "Jiang et al. 2024, LongLLMLingua (ACL)"
    summary = "passages and words, by what they have to do with the question"
    scores = "passages by the loss of the question after them, words by how much the question lowers their loss"
    deviations = "as llmlingua; the text's order stays"
    query_aware = True

    ratio_spread: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio_spread <= 1:
            raise InputError(f"{self.name}: ratio_spread has to be from 0 to 1, got {self.ratio_spread}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        assert question is not None
        ranked = self.ranked(passage, passages(passage, free, self.passage_tokens), question)
        chosen, held = [], 0
        for unit in ranked:
            if held >= self.coarse * room:
                break
            chosen.append(unit)
            held += unit.tokens
        average, n = room / max(1, held), len(chosen)
        shares = [min(1.0, max(0.0, average + self.ratio_spread * (1 - 2 * rank / n))) for rank in range(n)]
        asked = self.reader().encode(question.text)[: self.reader().stretch // 4]
        return self.pruned(passage, free, chosen, shares, room, asked)

    def ranked(self, passage: Passage, found: list[Unit], question: Question | None) -> list[Unit]:
        """The passages, the one after which the question is the likeliest in front."""
        assert question is not None
        lm = self.reader()
        asked = lm.encode("\n\n" + question.text + RESTRICTION)[: lm.stretch // 4]
        losses = []
        for given in self.ids_of(passage, found):
            read = [*lm.opening, *given, *asked]
            hidden = lm.states(read)[-len(asked) - 1 : -1]
            losses.append(lm.surprise(hidden, asked).mean())
        order = torch.stack(losses).argsort(stable=True).tolist() if losses else []
        return [found[at] for at in order]
