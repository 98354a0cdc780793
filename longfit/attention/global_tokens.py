"""A local window and a few tokens that see everything and are seen by everyone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.partial import merge, piece
from longfit.attention.pieces import attend_some
from longfit.attention.position import PositionPatch, Span
from longfit.cache import take

GLOBALS = "global_positions"
NOBODY = -1


@dataclass
class GlobalTokensPatch(PositionPatch):
    """Base of such patterns. One says which of the new tokens are global (`marks`).

    Three pieces, merged by their log-sum-exps: the window, read as a stretch of keys; the global tokens before it,
    gathered; and, for the few queries that are global themselves, everything that is stored. Where each row's global
    tokens stand is remembered in the part's state, so it follows rows, beams and memories.

    Attributes (options):
        window_tokens: last tokens that every query sees, itself included.
    """

    window_tokens: int = 512

    def __post_init__(self) -> None:
        self._at_least(1, window_tokens=self.window_tokens)

    def marks(self, scene: Scene) -> Tensor:
        """Which of the new tokens are global, bool [B, Q]."""
        raise NotImplementedError

    def known(self, scene: Scene, marked: Tensor) -> Tensor:
        """Positions [B, 1 or G, m] of the global tokens that the new tokens may see, `NOBODY` in empty places."""
        return _joined(scene.part.state.get(GLOBALS), places_of(marked, scene.first))[:, None]

    def spans(self, start: int, stop: int) -> list[Span]:
        return [(start - self.window_tokens + 1, stop)]

    def allowed(self, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        return keys > queries - self.window_tokens

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(scene)
        marked = self.marks(scene)
        known = self.known(scene, marked)
        if known.shape[2]:
            out, lse = merge(*self._globals(scene, known), out, lse)
        asking = marked.any(0).nonzero()[:, 0]
        if len(asking):
            full, full_lse = _everything(scene, asking)
            chosen = marked[:, None, asking]
            out[:, :, asking] = torch.where(chosen.unsqueeze(-1), full, out[:, :, asking])
            lse[:, :, asking] = torch.where(chosen, full_lse, lse[:, :, asking])
        self.remember(scene, marked)
        return out, lse

    def remember(self, scene: Scene, marked: Tensor) -> None:
        """Note the new tokens that are global and will be stored."""
        real = marked[:, : marked.shape[1] - scene.probe_tokens]
        if bool(real.any()):
            new = places_of(real, scene.first)
            scene.part.state[GLOBALS] = _joined(scene.part.state.get(GLOBALS), new)

    def _globals(self, scene: Scene, known: Tensor) -> tuple[Tensor, Tensor]:
        """The piece of the global tokens at `known` [B, 1 or G, m] that lie before the window."""
        B, G, Q, _ = scene.keys.shape
        places = known.expand(B, G, -1)
        own = places >= scene.first
        slots = (places - scene.first).clamp(0, Q - 1)
        keys, values, there = take(scene.keys, slots), take(scene.values, slots), own
        if scene.stored_keys is not None and scene.stored_values is not None and scene.positions is not None:
            held = scene.positions.long().contiguous()
            slots = torch.searchsorted(held, places.contiguous()).clamp(max=scene.stored - 1)
            found = held.gather(2, slots) == places
            picked = take(scene.stored_keys, slots), take(scene.stored_values, slots)
            keys = torch.where(found.unsqueeze(-1), picked[0], keys)
            values = torch.where(found.unsqueeze(-1), picked[1], values)
            there = own | found
            scene.read_bytes += sum(t.numel() * t.element_size() for t in picked)
        queries = torch.arange(scene.first, scene.first + Q, device=places.device)[:, None]
        allowed = there.unsqueeze(2) & (places.unsqueeze(2) <= queries - self.window_tokens)
        return attend_some(scene.queries, keys, values, allowed, scene.scaling)


def _everything(scene: Scene, asking: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention of the new tokens at `asking` [q]: out [B, H, q, Dv] and log-sum-exp [B, H, q]."""
    (B, H), G, q = scene.queries.shape[:2], scene.keys.shape[1], len(asking)
    queries = scene.queries[:, :, asking]
    own = torch.arange(scene.keys.shape[2], device=asking.device)
    causal = (own[None] <= asking[:, None])[None, None]
    out, lse = attend_some(queries, scene.keys, scene.values, causal, scene.scaling)
    if scene.stored_keys is None or scene.stored_values is None:
        return out, lse
    scene.read_bytes += sum(t.numel() * t.element_size() for t in (scene.stored_keys, scene.stored_values))
    packed = queries.reshape(B, G, H // G * q, -1)
    past, past_lse = piece(packed, scene.stored_keys, scene.stored_values, False, scene.scaling, scene.backend)
    return merge(past.reshape(out.shape), past_lse.reshape(lse.shape), out, lse)


def places_of(marked: Tensor, first: int) -> Tensor:
    """Positions [B, m] of the marked among new tokens [B, Q] that begin at `first`; `NOBODY` in empty places."""
    m = int(marked.sum(1).max())
    places = torch.arange(first, first + marked.shape[1], device=marked.device)
    return torch.where(marked, places, NOBODY).sort(1).values[:, marked.shape[1] - m :]


def _joined(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat([before, new], 1)
