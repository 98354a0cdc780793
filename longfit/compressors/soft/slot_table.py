"""What all methods with a table of slot embeddings share: how many rows it has, and which are used."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from longfit.compressors.soft.base import LearnedCompressor
from longfit.compressors.soft.modules import SlotEmbedding
from longfit.errors import InputError


@dataclass
class SlotTableCompressor(LearnedCompressor):
    """A method whose slots, appended to a segment, have an embedding each: rows of the module "slots".

    Options besides the common ones:
        lowest_ratio: the lowest ratio that the table has rows for; `ratio` if left out. A recipe that trains at several
            ratios sets it.
    """

    lowest_ratio: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest_ratio is not None and not 1 <= self.lowest_ratio <= self.ratio:
            raise InputError(
                f"{self.name}: lowest_ratio has to be between 1 and the ratio, {self.ratio}; got {self.lowest_ratio}"
            )

    def most_slots(self) -> int:
        """Slots of the longest segment at the lowest ratio: rows of the table."""
        return -(-self.segment_tokens // (self.lowest_ratio or self.ratio))

    def slot_rows(self, slots: int, like: Tensor) -> Tensor:
        """The first `slots` slot embeddings [B, N, E].

        Raises:
            InputError: there are fewer.
        """
        table = cast(SlotEmbedding, self.modules["slots"])
        if slots > table.weight.shape[0]:
            raise InputError(
                f"{self.name}: {slots} slots are needed and {table.weight.shape[0]} were made, for segments of "
                f"{self.segment_tokens} tokens at a ratio of {self.lowest_ratio or self.ratio}; make it with the "
                "lowest ratio in use (lowest_ratio)"
            )
        return table(like.shape[0], like.dtype, torch.arange(slots, device=like.device))
