"""What lies within the window of a block of queries, and what beyond it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.masked import attend_masked
from longfit.attention.partial import attend, attend_one, merge, piece, repeat

Attended = tuple[Tensor, Tensor]


@dataclass
class Sight:
    """Everything before a block of queries: what is stored and the chunk's own earlier tokens.

    keys, values [1, G, n, D] and positions [1, G, n]. Positions ascend, so what is beyond the window of some query is
    at the front (`before`) and what is within that of some query at the end (from `after`). asking [Q, 1] are the
    queries' positions.
    """

    keys: Tensor | None
    values: Tensor | None
    positions: Tensor | None
    asking: Tensor
    window: int | None
    before: int = 0
    after: int = 0

    @classmethod
    def of(cls, scene: Scene, start: int, stop: int, window: int | None) -> "Sight":
        """Without a window everything is within sight."""
        device, first = scene.queries.device, scene.first
        asking = torch.arange(first + start, first + stop, device=device)[:, None]
        keys, values = scene.keys[:, :, :start], scene.values[:, :, :start]
        if scene.stored_keys is not None and scene.stored_values is not None:
            keys = torch.cat([scene.stored_keys, keys], 2) if start else scene.stored_keys
            values = torch.cat([scene.stored_values, values], 2) if start else scene.stored_values
            scene.read_bytes += scene.stored_keys.nbytes + scene.stored_values.nbytes
        if not keys.shape[2]:
            return cls(None, None, None, asking, window)
        if window is None:
            return cls(keys, values, None, asking, None)
        positions = torch.arange(first, first + start, device=device).expand(*keys.shape[:2], -1)
        if scene.positions is not None and scene.stored:
            positions = torch.cat([scene.positions.long(), positions], 2)
        before = int((positions <= first + stop - 1 - window).sum(-1).max())
        after = int((positions <= first + start - window).sum(-1).min())
        return cls(keys, values, positions, asking, window, before, after)

    def near(self, scene: Scene, queries: Tensor, start: int, stop: int) -> Attended:
        """Attention to what is within the window, and causally to the block itself."""
        own_keys, own_values = scene.keys[:, :, start:stop], scene.values[:, :, start:stop]
        past, seen = None, None
        if self.keys is not None and self.values is not None and self.after < self.keys.shape[2]:
            past = self.keys[:, :, self.after :], self.values[:, :, self.after :]
            if self.before > self.after:
                seen = self.within[:, :, :, self.after :]
        if seen is None or past is None:
            if stop - start == 1:
                return attend_one(queries, own_keys, own_values, past, scene.scaling)
            return attend(queries, own_keys, own_values, past, scene.scaling, scene.backend)
        group = scene.group
        own = piece(queries, repeat(own_keys, group), repeat(own_values, group), True, scene.scaling, scene.backend)
        return merge(*attend_all(scene, queries, [(*past, seen)]), *own)

    def beyond(self, scene: Scene) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys without rotation, values and what each query sees of them, [1, G, Q, n] or None for all."""
        if not self.before:
            return []
        assert self.keys is not None and self.values is not None and self.positions is not None
        keys, places = self.keys[:, :, : self.before], self.positions[:, :, : self.before]
        if scene.rotate is not None:
            keys = scene.rotate(keys, -places)
        seen = ~self.within[..., : self.before] if self.before > self.after else None
        return [(keys, self.values[:, :, : self.before], seen)]

    @property
    def within(self) -> Tensor:
        """Which query is within the window of which entry, [1, G, Q, n]."""
        assert self.positions is not None and self.window is not None
        return self.positions.unsqueeze(2) > self.asking - self.window


def attend_all(scene: Scene, queries: Tensor, pieces: list[tuple[Tensor, Tensor, Tensor | None]]) -> Attended:
    """One softmax of queries [1, H, Q, D] over keys [1, G, S, D] and values of all pieces, where they are seen.

    Seen is [1, G, Q or 1, S], None for all. A query that sees nothing gets zeros and minus infinity.
    """
    keys = torch.cat([k for k, _, _ in pieces], 2) if len(pieces) > 1 else pieces[0][0]
    values = torch.cat([v for _, v, _ in pieces], 2) if len(pieces) > 1 else pieces[0][1]
    _, H, Q, _ = queries.shape
    G, group = keys.shape[1], scene.group
    if all(seen is None for _, _, seen in pieces):
        packed = queries.reshape(1, G, group * Q, -1)
        out, lse = piece(packed, keys, values, False, scene.scaling, scene.backend)
        return out.reshape(1, H, Q, -1), lse.reshape(1, H, Q)
    masks = [
        torch.ones(1, G, Q, k.shape[2], dtype=torch.bool, device=k.device) if seen is None else seen.expand(1, G, Q, -1)
        for k, _, seen in pieces
    ]
    seen = torch.cat(masks, -1).repeat_interleave(group, 1)
    out, lse = attend_masked(queries, keys, values, seen, scene.scaling, scene.backend)
    blind = ~seen.any(-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))
