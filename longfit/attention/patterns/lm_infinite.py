"""LM-Infinite: a Lambda-shaped mask and a limit to distances, so that inputs run past the trained window."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.partial import merge
from longfit.attention.pieces import attend_some
from longfit.attention.position import PositionPatch, Span
from longfit.attention.unrotated import (
    angles,
    check_rotary,
    own_unrotated,
    queries_at,
    stored_unrotated,
    trained_window,
)
from longfit.cache import take
from longfit.cache.products import dot_products
from longfit.errors import InputError

QUERY_BLOCK = 64


@dataclass
class LMInfinite(PositionPatch):
    """Every token sees the last `window_tokens` (local branch) and the first `global_tokens` (global branch), and no
    key ever appears farther away than `distance_limit`.

    Han et al. 2024, "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models". As in the
    authors' code the query is rotated to the limit and dotted with the key at position 0, for globals beyond it;
    distances are counted in the input, also where positions are packed. What is stored stays rotated at its own
    position: only the few globals are re-rotated.

    `middle_tokens` brings back, for each query and head, the tokens between the two branches with the largest
    logits, in layers from `middle_from_layer` on; they all stand at the distance limit. It needs everything stored,
    and once more the keys without positions.

    Attributes (options):
        global_tokens: first tokens of the input that every query sees; the paper finds 10 to 100 alike.
        window_tokens: by default the window that the model was made for, as in the paper.
        distance_limit: by default `window_tokens`.
        middle_tokens: k of the top-k in the middle; 0, the default, for none, 5 in the paper.
        middle_from_layer: first layer with middle tokens, counted from 0 among all layers of the model.
    """

    name = "lm_infinite"
    source = "Han et al. 2024 (LM-Infinite)"
    summary = "first tokens, a window and a limit to distances; runs past the trained window"
    extends = True

    global_tokens: int = 10
    window_tokens: int | None = None
    distance_limit: int | None = None
    middle_tokens: int = 0
    middle_from_layer: int = 4

    def __post_init__(self) -> None:
        self._at_least(
            0,
            global_tokens=self.global_tokens,
            middle_tokens=self.middle_tokens,
            middle_from_layer=self.middle_from_layer,
        )
        if self.window_tokens is not None:
            self._at_least(1, window_tokens=self.window_tokens)
        if self.distance_limit is not None:
            self._at_least(1, distance_limit=self.distance_limit)
        self._check_limit()

    def _check_limit(self) -> None:
        if self.window_tokens and self.distance_limit and self.distance_limit < self.window_tokens - 1:
            raise InputError(
                f"{self.name}: distance_limit={self.distance_limit} is smaller than the window of "
                f"{self.window_tokens} tokens, whose distances are never limited; give at least "
                f"{self.window_tokens - 1}"
            )

    def bind(self, model: Any) -> None:
        """
        Raises:
            UnsupportedModelError: some layers have no rotary positions to move.
            InputError: the distance limit is smaller than the model's window and no other window was given.
        """
        check_rotary(self.name, model)
        if self.window_tokens is None:
            self.window_tokens = trained_window(model)
        self._check_limit()

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"window_tokens": read_tokens + 1 - cls.global_tokens}

    @property
    def window(self) -> int:
        """Tokens of the local branch.

        Raises:
            InputError: neither given nor taken from a model yet.
        """
        if self.window_tokens is None:
            raise InputError(f"{self.name}: give window_tokens, or wrap a model, which sets it")
        return self.window_tokens

    @property
    def limit(self) -> int:
        """The largest distance at which a key appears."""
        return self.distance_limit or self.window

    def has_middle(self, layer: int) -> bool:
        """Whether the layer brings back tokens from the middle."""
        return self.middle_tokens > 0 and layer >= self.middle_from_layer

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        return key_dim * dtype_bytes if self.middle_tokens else 0.0

    def reach(self, layer: int, layers: int) -> int | None:
        return None if self.has_middle(layer) else self.global_tokens + self.window - 1

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor | None:
        if self.has_middle(layer):
            return None
        return (positions > seen - self.window) | (positions < self.global_tokens)

    def spans(self, start: int, stop: int) -> list[Span]:
        near = start - self.global_tokens < self.limit
        return [(0, self.global_tokens if near else 0), (start - self.window + 1, stop)]

    def allowed(self, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        near = (keys < self.global_tokens) & (queries - keys <= self.limit)
        return (keys > queries - self.window) | near

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(scene)
        last = scene.first + scene.queries.shape[2] - 1
        middle = self.has_middle(scene.layer) and last - self.window >= self.global_tokens
        if last <= self.limit and not middle:
            return out, lse
        queries = queries_at(scene, self.limit)
        if last > self.limit and self.global_tokens:
            out, lse = merge(*self._far_globals(scene, queries), out, lse)
        if middle:
            out, lse = merge(*self._middle(scene, queries), out, lse)
        return out, lse

    def _far_globals(self, scene: Scene, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The piece of the globals beyond the limit; queries [B, H, Q, D] as they stand there."""
        own = min(max(0, self.global_tokens - scene.first), scene.queries.shape[2])
        keys, values = [own_unrotated(scene, own)], [scene.values[:, :, :own]]
        device, store = queries.device, scene.part.store
        places = torch.arange(scene.first, scene.first + own, device=device).expand(*scene.keys.shape[:2], own)
        if store is not None and store.n and scene.stored_values is not None:
            assert scene.rotate is not None
            m = int((store.positions < self.global_tokens).sum(-1).max())
            keys.insert(0, scene.rotate(store.keys[:, :, :m], -angles(store)[:, :, :m]))
            values.insert(0, scene.stored_values[:, :, :m])
            places = torch.cat([store.positions[:, :, :m].long(), places], 2)
            scene.read_bytes += sum(t.numel() * t.element_size() for t in (keys[0], values[0]))
        asking = torch.arange(scene.first, scene.first + queries.shape[2], device=device)[:, None]
        places = places.unsqueeze(2)
        allowed = (places < self.global_tokens) & (asking - places > self.limit)
        return attend_some(queries, torch.cat(keys, 2), torch.cat(values, 2), allowed, scene.scaling)

    def _middle(self, scene: Scene, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The piece of the top-k between the branches; queries [B, H, Q, D] as they stand at the limit."""
        (B, G), Q = scene.keys.shape[:2], queries.shape[2]
        own = max(0, Q - self.window)  # newer ones are in every later query's window
        keys, values = [], []
        places = torch.arange(scene.first, scene.first + own, device=queries.device).expand(B, G, own)
        stored = stored_unrotated(scene)
        if stored is not None and scene.stored_values is not None and scene.positions is not None:
            keys, values = [stored], [scene.stored_values]
            places = torch.cat([scene.positions.long(), places], 2)
            scene.read_bytes += stored.numel() * stored.element_size()
        if own:
            keys.append(own_unrotated(scene, own))
            values.append(scene.values[:, :, :own])
        pieces = [
            self._top(scene, queries[:, :, at : at + QUERY_BLOCK], at, _one(keys), _one(values), places)
            for at in range(0, Q, QUERY_BLOCK)
        ]
        return torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)

    def _top(
        self, scene: Scene, queries: Tensor, at: int, keys: Tensor, values: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for a block of queries that begins at the new token `at`; places [B, G, S] of the keys."""
        B, H, Q, D = queries.shape
        G, S = keys.shape[1:3]
        k = min(self.middle_tokens, S)
        packed = queries.reshape(B, G, -1, D)
        logits = dot_products(packed, keys) if Q == 1 else torch.matmul(packed, keys.mT).float()
        logits = logits.mul_(scene.scaling).view(B, G, H // G, Q, S)
        first = scene.first + at
        asking = torch.arange(first, first + Q, device=queries.device)[:, None]
        places = places[:, :, None, None]
        hidden = (places < self.global_tokens) | (places > asking - self.window)
        top, slots = logits.masked_fill_(hidden, float("-inf")).topk(k, -1)
        chosen = take(values, slots.reshape(B, G, -1)).view(B, H, Q, k, -1)
        scene.read_bytes += chosen.numel() * chosen.element_size() if Q == 1 else 0
        lse = top.logsumexp(-1, keepdim=True)
        weights = (top - lse.masked_fill(lse.isneginf(), 0.0)).exp().to(values.dtype).reshape(B, H, Q, 1, k)
        return torch.matmul(weights, chosen).squeeze(3), lse.reshape(B, H, Q)


def _one(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
