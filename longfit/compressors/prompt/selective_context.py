"""Selective Context: phrases that tell the model something that it could not guess."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from longfit.compressors.prompt.base import Question
from longfit.compressors.prompt.budgets import best_sentences, by_score
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.scored import Scored, means
from longfit.compressors.prompt.units import LEVELS, sentences
from longfit.errors import InputError


@dataclass
class SelectiveContext(Scored):
    """Keeps the units of the highest self-information −log p, which is measured sentence by sentence, so that a token's
    place in the text does not count.

    Source: Li et al. 2023, "Compressing context to enhance inference efficiency of large language models", and its
    code: a unit's information is the mean over its tokens there (the paper says the sum).

    Deviations: phrases are cut at function words and punctuation marks, where the original takes a parser's noun
    chunks; a token budget says how much stays, where the original drops a percentile of the units.

    Attributes (options):
        unit: "phrase", "word" or "sentence".
    """

    name = "selective_context"
    source = "Li et al. 2023, Selective Context (EMNLP)"
    summary = "phrases of high self-information"
    scores = "phrases, words or sentences, by the mean -log p of their tokens, each sentence read alone"
    deviations = "phrases by function words, not by a parser; a budget in tokens, not a percentile of units"

    unit: str = "phrase"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in LEVELS:
            raise InputError(f"{self.name}: unit is {', '.join(LEVELS)}, not {self.unit!r}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        lm, units = self.reader(), LEVELS[self.unit](passage, free)
        ids = self.ids_of(passage, units)
        starts = {sentence.first for sentence in sentences(passage, free)}
        cuts = [0, *(at for at, unit in enumerate(units) if at and unit.first in starts), len(units)]
        texts = [[token for given in ids[a:b] for token in given] for a, b in pairwise(cuts)]
        texts = [piece for text in texts for piece in _pieces(text, lm.stretch // 2)]
        losses = torch.cat(lm.losses_apart(texts)) if texts else torch.zeros(0)
        return best_sentences(passage, by_score(units, means(losses, [len(given) for given in ids]).tolist()), room)


def _pieces(text: list[int], most: int) -> list[list[int]]:
    return [text[at : at + most] for at in range(0, max(1, len(text)), most)]
