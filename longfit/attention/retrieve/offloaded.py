"""Everything but sinks and window on the slow side, pages found by the bounds of their keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.offload import OffloadingPatch
from longfit.cache import SlowTier


@dataclass
class Offloaded(OffloadingPatch):
    """Each key/value head brings in the pages with the highest upper bound of query times key.

    The selection of Quest (Tang et al. 2024): a page keeps the smallest and the largest value of each key channel, and
    its bound is the sum over channels of the larger of query times either. Here it decides what leaves the slow side,
    so the bounds are all that is left on the fast side; heads that read one key/value head choose together, by the
    largest of their bounds, and the queries of a prefill block choose by their mean. Tokens keep their positions: with
    enough blocks it is full attention. Inputs past the model's window are packed, see `OffloadingPatch`.
    """

    name = "offloaded"
    source = "Tang et al. 2024 (Quest) for the selection"
    summary = "sinks and a window on the fast side, the rest on the slow one; pages brought in by their bounds"
    index_dims = 2

    window_tokens: int = 1024
    block_tokens: int = 64

    def describe(self, keys: Tensor, scores: dict[str, Tensor]) -> Tensor:
        return torch.cat([keys.amin(2), keys.amax(2)], -1)

    def choose(self, scene: Scene, tier: SlowTier, queries: Tensor) -> list[list[int]]:
        assert tier.index is not None
        low, high = tier.index.used.float().chunk(2, -1)  # [1, G, pages, D]
        asked = queries.float().mean(2).view(1, low.shape[1], -1, low.shape[-1])
        # The larger of q low and q high is q high for positive q, q low for negative.
        bounds = torch.matmul(asked.clamp(min=0), high.mT) + torch.matmul(asked.clamp(max=0), low.mT)
        return bounds.amax(2)[0].topk(self.top_blocks).indices.tolist()
