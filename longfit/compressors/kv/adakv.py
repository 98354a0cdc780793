"""AdaKV: one budget for all heads of a layer, shared by score."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import Wrapper
from longfit.errors import InputError


@dataclass
class AdaKV(Wrapper):
    """AdaKV: the heads of a layer share its budget, the highest scores of all heads together stay; each head keeps at
    least `safeguard` of an even share (Feng et al., 2024, arXiv:2407.11550, algorithm 1; the floor as in kvpress).

    What a head does not keep is really freed: each head has a store of its own size.

    Args:
        scorer: any plain scorer, by name or as an object.
        safeguard: fraction of the even share that no head falls below.
    """

    name = "adakv"
    source = "arXiv:2407.11550"
    summary = "head budgets around any scorer, really evicted"
    ragged = True

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise InputError(f"adakv: safeguard is a fraction from 0 to 1, got {self.safeguard}")

    def select(self, views: list[View], scores: list[Tensor], n_keep: int) -> list[Tensor]:
        sizes = [given.shape[-1] for given in scores]
        safe = max(1, int(n_keep * self.safeguard)) if self.safeguard else 0
        raised = []
        for given in scores:
            given = given.flatten().clone()
            given[given.topk(min(safe, given.numel())).indices] = float("inf")
            raised.append(given)
        kept = torch.cat(raised).topk(n_keep * len(scores)).indices
        mask = torch.zeros(sum(sizes), dtype=torch.bool, device=kept.device)
        mask[kept] = True
        return [part.nonzero().view(1, 1, -1) for part in mask.split(sizes)]
