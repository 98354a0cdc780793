"""Decoding over a few slots that stand for the stored past."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.partial import attend_one, merge
from longfit.cache import SideIndex, Store
from longfit.cache.products import dot_products
from longfit.errors import InputError


@dataclass
class SlotPatch(AttentionPatch):
    """Base of the approximations. A method writes `make`: slots of keys and values for a stretch of stored entries.

    A decoded token attends to the slots as to keys and values, each weighing as many tokens as there are to a slot,
    and exactly to the first entries, to the last ones and to itself. The slots are made anew whenever
    `refresh_tokens` more entries are stored, so that a step reads slots only. Everything is kept.

    Attributes (options of every approximation):
        slots: slots per key/value head.
        sink_tokens, recent_tokens: entries at the start and at the end that stay exact.
        refresh_tokens: up to this many more at the end do, until the next refresh.
    """

    phases: ClassVar[tuple[str, ...]] = ("decode",)
    alike_in_chunks: ClassVar[bool] = False

    slots: int = 256
    sink_tokens: int = 4
    recent_tokens: int = 64
    refresh_tokens: int = 64

    def __post_init__(self) -> None:
        self._at_least(1, slots=self.slots, refresh_tokens=self.refresh_tokens)
        self._at_least(0, sink_tokens=self.sink_tokens, recent_tokens=self.recent_tokens)

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        exact = cls.sink_tokens + cls.recent_tokens + cls.refresh_tokens - 1
        if read_tokens <= exact:
            raise InputError(
                f"{cls.name} reads {exact} tokens exactly, which leaves no slots within read_tokens={read_tokens}; "
                f"give at least {exact + 1}, or its own options"
            )
        return {"slots": read_tokens - exact}

    def make(self, scene: Scene, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Slots for entries [B, G, m, D] and [B, G, m, Dv]: keys [B, G, slots, D], values [B, G or H, slots, Dv]."""
        raise NotImplementedError

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        return 4 * 2 * kv_heads * self.slots * key_dim

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        return 4 * 3 * kv_heads * kept * key_dim

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        n, store = scene.stored, scene.part.store
        stop = (n - self.recent_tokens) // self.refresh_tokens * self.refresh_tokens
        covered = stop - self.sink_tokens
        if scene.queries.shape[2] != 1 or covered <= self.slots:
            return scene.full()
        assert scene.stored_keys is not None and scene.stored_values is not None and store is not None
        stretch = slice(self.sink_tokens, stop)
        if not isinstance(scene.part.index, SlotIndex):
            scene.part.index = SlotIndex()
        index = scene.part.index
        if not index.describes(store, stretch):
            keys, values = scene.stored_keys[:, :, stretch], scene.stored_values[:, :, stretch]
            scene.read_bytes += _bytes(keys) + _bytes(values)
            index.take(store, stretch, self.make(scene, keys, values))
        exact = [
            torch.cat([t[:, :, : stretch.start], t[:, :, stretch.stop :]], 2)
            for t in (scene.stored_keys, scene.stored_values)
        ]
        scene.read_bytes += _bytes(*exact) + index.nbytes
        past = attend_to_slots(scene.queries, index.keys, index.values, covered, scene.scaling)
        return merge(*past, *attend_one(scene.queries, scene.keys, scene.values, (exact[0], exact[1]), scene.scaling))


class SlotIndex(SideIndex):
    """The slots made last, and for which entries."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = torch.empty(0)
        self.stretch = slice(0, 0)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def describes(self, store: Store, stretch: slice) -> bool:
        """Whether the slots stand for these entries of this store."""
        return store is self.store and store.version == self.version and stretch == self.stretch

    def take(self, store: Store, stretch: slice, slots: tuple[Tensor, Tensor]) -> None:
        """Hold new slots."""
        self.keys, self.values = slots
        self.store, self.version, self.n, self.stretch = store, store.version, store.n, stretch


def attend_to_slots(
    queries: Tensor, keys: Tensor, values: Tensor, covered: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, H, Q, D] to slots, which stand for `covered` entries in equal parts.

    keys [B, G, k, D], values [B, G or H, k, Dv]. Returns out [B, H, Q, Dv] and log-sum-exp [B, H, Q] in fp32.
    """
    B, H, Q, D = queries.shape
    G, k = keys.shape[1:3]
    logits = dot_products(queries.reshape(B, G, -1, D), keys) * scaling + math.log(covered / k)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp().reshape(B, values.shape[1], -1, k)
    out = torch.matmul(weights.to(values.dtype), values)
    return out.reshape(B, H, Q, -1).to(queries.dtype), lse.reshape(B, H, Q)


def segment_means(vectors: Tensor, segments: int) -> Tensor:
    """Means [B, N, segments, D] in fp32 of consecutive stretches of [B, N, S, D] that differ by one at most."""
    S = vectors.shape[2]
    places = torch.arange(S, device=vectors.device) * segments // S
    sums = vectors.new_zeros(*vectors.shape[:2], segments, vectors.shape[3], dtype=torch.float32)
    counts = places.bincount(minlength=segments)
    return sums.index_add_(2, places, vectors.float()) / counts.unsqueeze(-1)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
