"""Linformer without training: keys and values of the past projected to a fixed number of slots."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.slots import SlotPatch, segment_means
from longfit.errors import InputError


@dataclass
class Linformer(SlotPatch):
    """The stored past projected along its length, K' = E K and V' = E V, and attended to in full.

    Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity". The paper learns E; here it is one of the
    forms that need no training: "mean", means of consecutive stretches (the paper's pooling projection), or "random",
    a fixed Gaussian matrix with variance 1 / slots (its Johnson-Lindenstrauss argument, section 4) drawn from `seed`.

    Deviations: causal decoding, so that only what is stored is projected, and what is recent stays exact; a slot
    weighs as many tokens as it stands for, so that past and recent tokens share one softmax. Prefill is full.
    """

    name = "linformer"
    source = "Wang et al. 2020 (Linformer)"
    summary = "decoding over a fixed projection of the past, untrained"

    projection: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection not in ("mean", "random"):
            raise InputError(f'{self.name}: projection={self.projection!r}; it is "mean" or "random"')

    def make(self, scene: Scene, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.projection == "mean":
            made = segment_means(keys, self.slots), segment_means(values, self.slots)
        else:
            projection = random_projection(keys.shape[2], self.slots, self.seed).to(keys.device)
            made = projection @ keys.float(), projection @ values.float()
        return made[0].to(keys.dtype), made[1].to(values.dtype)


def random_projection(entries: int, slots: int, seed: int) -> Tensor:
    """Gaussian [slots, entries] with variance 1 / slots."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slots, entries, generator=generator) / slots**0.5
