"""Adamas: Manhattan distance between 2-bit codes of query and keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention import kernels
from longfit.attention.base import Scene
from longfit.attention.codes import CodeIndex, bucketed
from longfit.attention.hadamard import hadamard, padded_size
from longfit.attention.select import SelectingPatch
from longfit.cache.side_index import pack_bits
from longfit.errors import InputError

PUBLISHED = (-10.0, 0.0, 10.0)
QUARTILES = (0.25, 0.5, 0.75)
SAMPLED_KEYS = 1024


@dataclass
class Adamas(SelectingPatch):
    """Attends to the keys whose 2-bit code is nearest to the query's.

    Yan et al. 2025, "Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference": queries and keys, as
    rotated, go through a normalised Hadamard transform, each value becomes one of four buckets, and the keys of
    smallest Manhattan distance to the query are attended to (budgets of 64 and 128 tokens in the paper). The first two
    layers stay full. This is the distance as the paper defines it; its CUDA kernel takes XOR and a bit count, which is
    another measure. A head size that is no power of two is padded with zeros for the transform.

    The published edges of the buckets are absolute, -10, 0 and 10, and keys of another scale than the paper's models
    fall into two of them. `thresholds="calibrated"` takes the quartiles of each key/value head's own keys for the keys
    and those of the query's own values for the query: ours, no data set needed. They are taken when the index is
    built, from up to 1,024 keys at even distances, and again when it has doubled.

    Attributes:
        thresholds: "fixed", "calibrated", or three ascending numbers in place of the published ones.

    Raises:
        InputError: `thresholds` is none of these.
    """

    name = "adamas"
    source = "Yan et al. 2025 (Adamas)"
    summary = "nearest 2-bit codes in the Hadamard basis"

    thresholds: str | Sequence[float] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds in ("fixed", "calibrated"):
            return
        given = self.thresholds
        if isinstance(given, str) or len(given) != 3 or not given[0] < given[1] < given[2]:
            raise InputError(f'adamas: thresholds={given!r}; it is "fixed", "calibrated" or three ascending numbers')

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        return padded_size(key_dim) / 4

    def estimate(self, scene: Scene) -> Tensor:
        if not isinstance(scene.part.index, AdamasIndex):
            scene.part.index = AdamasIndex(self.thresholds)
        index, store = scene.part.index, scene.part.store
        assert store is not None
        index.follow(store)
        codes = index.codes.used
        scene.read_bytes += codes.numel()
        B, G, _, W = codes.shape
        queries = hadamard(scene.queries).view(B, G, -1, 4 * W)
        edges = quartiles(queries) if self.thresholds == "calibrated" else index.edges
        return kernels.code_nearness(pack_bits(bucketed(queries, edges)), codes)


class AdamasIndex(CodeIndex):
    """Codes between edges that are given, or that are the quartiles of each head's keys."""

    def __init__(self, thresholds: str | Sequence[float]) -> None:
        super().__init__()
        self.thresholds = thresholds

    def calibrate(self, keys: Tensor) -> Tensor:
        if self.thresholds == "calibrated":
            apart = -(-keys.shape[2] // SAMPLED_KEYS)
            return quartiles(hadamard(keys[:, :, ::apart]).flatten(2)).unsqueeze(-1)
        edges = PUBLISHED if isinstance(self.thresholds, str) else self.thresholds
        return torch.tensor(edges, dtype=torch.float32, device=keys.device).view(3, 1, 1, 1, 1)


def quartiles(values: Tensor) -> Tensor:
    """The three quartiles along the last dimension, [3, ..., 1]."""
    at = torch.tensor(QUARTILES, device=values.device)
    return values.quantile(at, -1, keepdim=True)
