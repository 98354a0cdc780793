"""Patterns in which positions alone decide what a query sees: the work grows with what is in sight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.masked import attend_masked
from longfit.attention.partial import attend_one

Span = tuple[int, int]


@dataclass
class PositionPatch(AttentionPatch):
    """Base of such patterns. One says for a block of queries which stretches of keys it can see at all (`spans`: only
    these are read), and for each pair whether the query sees the key (`allowed`)."""

    stores = "reachable"

    def spans(self, start: int, stop: int) -> list[Span]:
        """Stretches [from, to) of key positions that hold everything that queries at [start, stop) see.

        Ascending and disjoint; they may reach below 0 and past `stop`, causality is seen to elsewhere.
        """
        raise NotImplementedError

    def allowed(self, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        """Whether a query at `queries` [Q, 1] of query head `heads` [H, 1, 1] sees the key at `keys` [..., 1, S].

        Returns a bool tensor that broadcasts to [B, H, Q, S]. A query has to see its own position.
        """
        raise NotImplementedError

    @property
    def block_tokens(self) -> int:
        """Queries that are attended with at once."""
        return 256

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        Q = scene.queries.shape[2]
        uniform = scene.positions is None or bool((scene.positions == scene.positions[:1, :1]).all())
        blocks = [
            self._block(scene, start, min(start + self.block_tokens, Q), uniform)
            for start in range(0, Q, self.block_tokens)
        ]
        if len(blocks) == 1:
            return blocks[0]
        return torch.cat([out for out, _ in blocks], 2), torch.cat([lse for _, lse in blocks], 2)

    def _block(self, scene: Scene, start: int, stop: int, uniform: bool) -> tuple[Tensor, Tensor]:
        """Attention of the new tokens start to stop."""
        first, device = scene.first, scene.queries.device
        spans = merged(self.spans(first + start, first + stop))
        slots = _stored_slots(scene, spans, uniform)
        own = [(max(0, a - first), min(b - first, stop)) for a, b in spans if b > first and a < first + stop]
        stored_keys, stored_values = _pick(scene.stored_keys, slots), _pick(scene.stored_values, slots)
        if stored_keys is not None and stored_values is not None:
            scene.read_bytes += stored_keys.numel() * stored_keys.element_size()
            scene.read_bytes += stored_values.numel() * stored_values.element_size()
        own_places = torch.cat([torch.arange(a, b, device=device) for a, b in own])
        places = (own_places + first).expand(1, 1, -1)
        if stored_keys is not None and scene.positions is not None:
            stored = _pick(scene.positions[:1, :1] if uniform else scene.positions, slots)
            assert stored is not None
            places = torch.cat([stored.long(), places.expand(*stored.shape[:2], -1)], 2)
        asking = torch.arange(first + start, first + stop, device=device)[:, None]
        seen = self._seen(scene, asking, places)
        queries = scene.queries[:, :, start:stop]
        if stop - start == 1 and bool(seen.all()):
            past = None if stored_keys is None or stored_values is None else (stored_keys, stored_values)
            return attend_one(
                queries, scene.keys[:, :, start:stop], scene.values[:, :, start:stop], past, scene.scaling
            )
        keys = [_pick(scene.keys, own), stored_keys]
        values = [_pick(scene.values, own), stored_values]
        return attend_masked(queries, _joined(keys), _joined(values), seen, scene.scaling, scene.backend)

    def _seen(self, scene: Scene, asking: Tensor, places: Tensor) -> Tensor:
        """Bool [1 or B, 1 or H, Q, S]."""
        H = scene.queries.shape[1]
        first_head = scene.part.heads.start * scene.group
        heads = torch.arange(first_head, first_head + H, device=asking.device)[:, None, None]
        if places.shape[1] > 1:
            places = places.repeat_interleave(scene.group, 1)
        places = places.unsqueeze(2)
        seen = self.allowed(asking, places, heads) & (places <= asking)
        return seen.expand(-1, -1, asking.shape[0], -1)


def merged(spans: list[Span]) -> list[Span]:
    """Overlapping and touching stretches joined; what is empty or below 0 is cut off."""
    found: list[Span] = []
    for start, stop in sorted((max(0, a), b) for a, b in spans if b > max(0, a)):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _stored_slots(scene: Scene, spans: list[Span], uniform: bool) -> list[Span]:
    """Slots of the stored entries within the spans; all slots where the heads hold different entries."""
    if scene.stored == 0 or scene.positions is None:
        return []
    if not uniform:
        return [(0, scene.stored)]
    edges = torch.tensor(spans, dtype=scene.positions.dtype, device=scene.positions.device)
    found = torch.searchsorted(scene.positions[0, 0].contiguous(), edges).tolist()
    return merged([(a, b) for a, b in found])


def _pick(entries: Tensor | None, slots: list[Span]) -> Tensor | None:
    """The entries [B, G, ...] at some slots, without a copy where they are one stretch; None where there are none."""
    if entries is None or not slots:
        return None
    pieces = [entries[:, :, a:b] for a, b in slots]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _joined(own_and_stored: list[Tensor | None]) -> Tensor:
    """Stored entries, if any, before the chunk's own."""
    own, stored = own_and_stored
    assert own is not None
    return own if stored is None else torch.cat([stored, own], 2)
