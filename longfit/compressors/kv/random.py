"""Random: the floor that every method has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor


@dataclass
class Random(KVCompressor):
    """Random: each entry's score is a hash of its layer, head and position.

    A hash, so that a row gets the same scores in any batch and in every run.

    Args:
        seed: another seed, another draw.
    """

    name = "random"
    source = "baseline"
    summary = "keeps entries at random"

    seed: int = 0

    def score(self, view: View) -> Tensor:
        heads = torch.arange(view.positions.shape[1], device=view.positions.device)[None, :, None]
        place = (heads + view.first_head) * 7_919 + view.layer * 104_729 + self.seed * 15_485_863
        x = view.positions.long() * 1_000_003 + place
        for shift in (16, 13, 16):
            x = ((x ^ (x >> shift)) * 0x45D9F3B) & 0xFFFFFFFF
        return x.float() / 2**32
