"""LLMLingua: passages, then words, that a small model finds hard to guess."""

from dataclasses import dataclass

from longfit.compressors.prompt.base import Question
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.pruning import prune
from longfit.compressors.prompt.scored import Scored, means
from longfit.compressors.prompt.units import Unit, joined, sentences, words
from longfit.errors import InputError


@dataclass
class LLMLingua(Scored):
    """Keeps passages of high perplexity up to `coarse` times the budget, and of those the words of the highest loss,
    segment by segment, each in sight of what was kept before it.

    Source: Jiang et al. 2023, "LLMLingua: compressing prompts for accelerated inference of large language models"
    (budget controller with k = 2, iterative token-level compression), and its code (segments of 200 tokens).

    Deviations: whole words stay, by the mean loss of their tokens; passages of the text stand for demonstrations; the
    budget is the target's tokens, and what whole words leave over of a segment's share goes to the next segment; the
    scorer is not aligned to the target by tuning.

    Attributes (options):
        coarse: how many times the budget the first step leaves.
        segment_tokens: of one step of the pruning.
        passage_tokens: the longest passage.
    """

    name = "llmlingua"
    source = "Jiang et al. 2023, LLMLingua (EMNLP)"
    summary = "passages, then words, that are hard to guess"
    scores = "passages by perplexity, then words by -log p after what was kept before them"
    deviations = "whole words; passages of the text for demonstrations; no tuning of the scorer"

    coarse: float = 2.0
    segment_tokens: int = 200
    passage_tokens: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse < 1:
            raise InputError(f"{self.name}: coarse has to be at least 1, got {self.coarse}")
        for option in ("segment_tokens", "passage_tokens"):
            if not 8 <= getattr(self, option) <= 512:
                raise InputError(f"{self.name}: {option} has to be from 8 to 512, got {getattr(self, option)}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        found = passages(passage, free, self.passage_tokens)
        ranked = self.ranked(passage, found, question)
        chosen, held = [], 0
        for unit in ranked:
            if held >= self.coarse * room:
                break
            chosen.append(unit)
            held += unit.tokens
        return self.pruned(passage, free, chosen, [1.0] * len(chosen), room)

    def ranked(self, passage: Passage, found: list[Unit], question: Question | None) -> list[Unit]:
        """The passages, the one to keep first in front: here by perplexity, highest first."""
        ids = self.ids_of(passage, found)
        losses = self.reader().losses([token for given in ids for token in given])
        scores = means(losses, [len(given) for given in ids]).tolist()
        return [found[at] for at in sorted(range(len(found)), key=lambda at: (-scores[at], at))]

    def pruned(
        self,
        passage: Passage,
        free: list[bool],
        chosen: list[Unit],
        shares: list[float],
        room: int,
        before: list[int] | None = None,
    ) -> list[int]:
        """Places of the tokens of the words that stay of the chosen passages, which keep by their shares."""
        share_of = {place: share for unit, share in zip(chosen, shares, strict=True) for place in range(*unit)}
        units = [unit for unit in words(passage, free) if unit.first in share_of]
        ids, sizes = self.ids_of(passage, units), [unit.tokens for unit in units]
        if sum(sizes) <= room:
            return [place for unit in units for place in range(*unit)]
        weights = [share_of[unit.first] for unit in units]
        kept = prune(self.reader(), ids, sizes, weights, room, self.segment_tokens, before)
        return [place for at in kept for place in range(*units[at])]


def passages(passage: Passage, free: list[bool], most_tokens: int) -> list[Unit]:
    """Paragraphs, or runs of sentences where they are longer than `most_tokens`."""

    def ends(said: str, following: str) -> bool:
        gap = said[len(said.rstrip()) :] + following[: len(following) - len(following.lstrip())]
        return gap.count("\n") >= 2

    return joined(passage, sentences(passage, free), ends, most_tokens)
