"""Nystromformer without training: attention to the past through landmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.partial import repeat
from longfit.attention.slots import SlotPatch, segment_means

SUMS = "nystrom_query_sums"


@dataclass
class Nystrom(SlotPatch):
    """softmax(Q K^T) V of the stored past as softmax(q K'^T) pinv(softmax(Q' K'^T)) softmax(Q' K^T) V.

    Xiong et al. 2021, "Nystromformer". Landmarks K' are means of consecutive stretches of the stored keys, Q' those
    of all queries so far, and the pseudo-inverse is the paper's iteration (equation 14). The last three factors do
    not depend on the new query: they are the values of the slots, so a step costs what as many keys would.

    Deviations: causal decoding, so that only what is stored is approximated, and what is recent stays exact; the
    past's share of the softmax is estimated from K' alone. Q' are running means, whose stretches double in length
    when there are more than `slots`: there are as many as `slots` or down to half of them. Prefill is full; it is
    listed as a phase since its queries are taken down.

    Attributes (options):
        iterations: of the pseudo-inverse.
    """

    name = "nystrom"
    source = "Xiong et al. 2021 (Nystromformer)"
    summary = "decoding through landmarks of the past, untrained"
    phases = ("prefill", "decode")

    iterations: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(2, slots=self.slots)
        self._at_least(1, iterations=self.iterations)

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        return 4 * (2 * query_heads + kv_heads) * self.slots * key_dim

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        return 4 * query_heads * (2 * kept * (key_dim + self.slots) + 6 * self.slots**2)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        state, real = scene.part.state, max(0, scene.queries.shape[2] - scene.probe_tokens)
        if real:
            state[SUMS] = add_queries(state.get(SUMS), scene.queries[:, :, :real], scene.first, self.landmarks)
        return scene.full() if scene.phase == "prefill" else super().attend(scene)

    @property
    def landmarks(self) -> int:
        """The most Q' there are: `slots`, or one less to make it even."""
        return self.slots // 2 * 2

    def make(self, scene: Scene, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        asking = query_means(scene.part.state[SUMS], scene.first + 1, self.landmarks)
        return nystrom_slots(asking, keys, values, self.slots, scene.scaling, self.iterations)


def nystrom_slots(
    landmark_queries: Tensor, keys: Tensor, values: Tensor, slots: int, scaling: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Landmark keys, and the product of all factors behind them.

    Args:
        landmark_queries: [B, H, M, D] in fp32.
        keys, values: [B, G, S, D] and [B, G, S, Dv].
        slots: landmarks of the keys.
        scaling: factor of the dot products.
        iterations: of the pseudo-inverse.

    Returns:
        [B, G, slots, D] in the dtype of the keys, and [B, H, slots, Dv] in that of the values.
    """
    group = landmark_queries.shape[1] // keys.shape[1]
    landmark_keys = segment_means(keys, slots)
    between = (landmark_queries @ repeat(landmark_keys, group).mT * scaling).softmax(-1)
    over_all = (landmark_queries @ repeat(keys.float(), group).mT * scaling).softmax(-1)
    behind = pseudo_inverse(between, iterations) @ (over_all @ repeat(values.float(), group))
    return landmark_keys.to(keys.dtype), behind.to(values.dtype)


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse [..., m, l] of rows that sum to one [..., l, m], approached in steps of third order."""
    columns, rows = matrix.abs().sum(-2).amax(-1), matrix.abs().sum(-1).amax(-1)
    inverse = matrix.mT / (columns * rows)[..., None, None]
    unit = torch.eye(matrix.shape[-2], device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * unit - product @ (15 * unit - product @ (7 * unit - product)))
    return inverse


def stretch_tokens(seen: int, landmarks: int) -> int:
    """Tokens of a stretch of queries: the smallest power of two that needs no more than `landmarks` stretches."""
    length = 1
    while length * landmarks < seen:
        length *= 2
    return length


def add_queries(sums: Tensor | None, queries: Tensor, first: int, landmarks: int) -> Tensor:
    """Sums [B, H, landmarks, D] in fp32 over stretches of all queries, the new ones [B, H, Q, D] from place `first` on
    included; stretches are joined two by two as they double in length."""
    if sums is None:
        sums = queries.new_zeros(*queries.shape[:2], landmarks, queries.shape[3], dtype=torch.float32)
    length, new_length = stretch_tokens(first, landmarks), stretch_tokens(first + queries.shape[2], landmarks)
    while length < new_length:
        joined = sums.unflatten(2, (-1, 2)).sum(3)
        sums, length = torch.cat([joined, torch.zeros_like(joined)], 2), 2 * length
    places = torch.arange(first, first + queries.shape[2], device=queries.device) // length
    return sums.index_add(2, places, queries.float())


def query_means(sums: Tensor, seen: int, landmarks: int) -> Tensor:
    """Means [B, H, M, D] of the stretches that `seen` queries fill."""
    length = stretch_tokens(seen, landmarks)
    starts = torch.arange(0, seen, length, device=sums.device)
    counts = (seen - starts).clamp(max=length)
    return sums[:, :, : len(starts)] / counts.unsqueeze(-1)
