"""What the methods share that score with a language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.compressors.prompt.base import PromptCompressor
from longfit.compressors.prompt.lm import STRETCH_TOKENS, checked_scorer
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import Unit


@dataclass
class Scored(PromptCompressor):
    """Base of the methods that read the text with a causal LM.

    Attributes (options):
        scorer: the LM that scores, by a name that `longfit.load` takes or as a pair (model, tokenizer); the model
            itself by default. It may have another tokenizer than the model.
    """

    reads = True
    held_tokens = STRETCH_TOKENS

    scorer: Any = None

    def ids_of(self, passage: Passage, units: Sequence[Unit]) -> list[list[int]]:
        """The scorer's ids of each unit: the passage's own, or what the unit's text is by the scorer's tokenizer."""
        lm = self.reader()
        if lm.own:
            return [passage.ids[unit.first : unit.stop] for unit in units]
        return [lm.encode(passage.said(*unit)) for unit in units]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scorer = checked_scorer(self.scorer, self.name)


def means(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[N] means of consecutive groups of values [n, ...] of the given sizes; 0 of an empty group."""
    owner = torch.arange(len(sizes), device=values.device).repeat_interleave(torch.tensor(sizes, device=values.device))
    sums = values.new_zeros(len(sizes), *values.shape[1:]).index_add_(0, owner, values)
    counts = torch.tensor(sizes, device=values.device).clamp(min=1).to(values.dtype)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))
