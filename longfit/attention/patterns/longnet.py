"""LongNet: dilated attention over segments that grow geometrically."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.partial import attend, merge, repeat
from longfit.attention.pieces import attend_some
from longfit.errors import InputError


@dataclass
class LongNet(AttentionPatch):
    """Several branches of dilated attention. Branch k cuts the input into segments of `segment_tokens * growth**k`
    tokens and keeps every `growth**k`-th of each; those attend causally to each other. Query head h starts at the
    h-th token (modulo the dilation), so that the heads together cover all.

    Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens": a token's outputs of the branches are
    weighted by the denominators of their softmaxes, that is by log-sum-exp, so a key that several branches share
    counts once in each. Branch 0 is not dilated, so every token attends somewhere.

    The work really shrinks: a branch gathers one key in `growth**k` and attends without a mask. The paper trains a
    model so. A pretrained one loses its first tokens, on which it rests attention, at the first border of a segment:
    as a branch of their own, `sink_tokens` (ours; 0 is the paper's) are seen by all queries behind the first of the
    smallest segments. Nothing else before the largest segment of a query is in sight.

    Attributes (options):
        segment_tokens: tokens of the smallest segment, the paper's w_0.
        growth: the paper's alpha: by how much the segments and dilations of one branch exceed those of the one before.
        branches: how many there are.
        sink_tokens: first tokens of the input that all queries see.
    """

    name = "longnet"
    source = "Ding et al. 2023 (LongNet)"
    summary = "dilated attention in segments that grow geometrically, and sinks"
    stores = "reachable"

    segment_tokens: int = 2048
    growth: int = 2
    branches: int = 5
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        self._at_least(1, segment_tokens=self.segment_tokens, branches=self.branches)
        self._at_least(2, growth=self.growth)
        self._at_least(0, sink_tokens=self.sink_tokens)
        if self.sink_tokens > self.segment_tokens:
            raise InputError(
                f"longnet: {self.sink_tokens} sinks are more than the smallest segment of {self.segment_tokens} tokens"
            )

    @property
    def largest_segment(self) -> int:
        """Tokens of the last branch's segments."""
        return self.segment_tokens * self.growth ** (self.branches - 1)

    def reach(self, layer: int, layers: int) -> int:
        return self.largest_segment - 1 + self.sink_tokens

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor:
        # Which residues the heads of a part want is not asked here: with GQA mostly all of them.
        return (positions >= seen - seen % self.largest_segment) | (positions < self.sink_tokens)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        B, H, Q, _ = scene.queries.shape
        positions = scene.positions
        if positions is None or bool((positions == positions[:1, :1]).all()):
            return self._rows(scene, slice(0, B), slice(0, scene.keys.shape[1]))
        out = scene.queries.new_empty(B, H, Q, scene.values.shape[-1])
        lse = torch.empty(B, H, Q, dtype=torch.float32, device=out.device)
        for b in range(B):  # what a compressor left differs from head to head
            for g in range(scene.keys.shape[1]):
                heads = slice(g * scene.group, (g + 1) * scene.group)
                out[b : b + 1, heads], lse[b : b + 1, heads] = self._rows(scene, slice(b, b + 1), slice(g, g + 1))
        return out, lse

    def _rows(self, scene: Scene, rows: slice, groups: slice) -> tuple[Tensor, Tensor]:
        """Attention of some rows and key/value heads whose stored entries have the same positions."""
        heads = slice(groups.start * scene.group, groups.stop * scene.group)
        queries = scene.queries[rows, heads]
        stored: tuple[Tensor, Tensor] | None = None
        positions = torch.empty(0, dtype=torch.long, device=queries.device)
        if scene.stored_keys is not None and scene.stored_values is not None and scene.positions is not None:
            stored = scene.stored_keys[rows, groups], scene.stored_values[rows, groups]
            positions = scene.positions[rows.start, groups.start].long()
        branch = _Branch(scene, queries, scene.keys[rows, groups], scene.values[rows, groups], stored, positions)
        out, lse = branch.undilated(self.segment_tokens)
        first_head = scene.part.heads.start * scene.group + heads.start
        for k in range(1, self.branches):
            branch.add_dilated(out, lse, self.segment_tokens * self.growth**k, self.growth**k, first_head)
        if self.sink_tokens and scene.first + queries.shape[2] > self.segment_tokens:
            out, lse = merge(*branch.sinks(self.sink_tokens, self.segment_tokens), out, lse)
        return out, lse


@dataclass
class _Branch:
    """The pieces of dilated attention over entries of which each head holds the same.

    queries [B, H, Q, D]; keys, values the new tokens' [B, G, Q, ...]; stored keys and values [B, G, n, ...] or None and
    their positions [n].
    """

    scene: Scene
    queries: Tensor
    keys: Tensor
    values: Tensor
    stored: tuple[Tensor, Tensor] | None
    positions: Tensor

    def segments(self, size: int) -> list[tuple[int, int, int]]:
        """Of each segment that new tokens are in: its start in the input, and where its new tokens start and stop."""
        first, Q = self.scene.first, self.queries.shape[2]
        starts = range(first - first % size, first + Q, size)
        return [(start, max(start - first, 0), min(start + size - first, Q)) for start in starts]

    def undilated(self, size: int) -> tuple[Tensor, Tensor]:
        """Causal attention within segments of `size` tokens."""
        pieces = [
            self._attend(slice(None), slice(a, b), *self._past(slice(None), start, 1, 0))
            for start, a, b in self.segments(size)
        ]
        return torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)

    def add_dilated(self, out: Tensor, lse: Tensor, size: int, dilation: int, first_head: int) -> None:
        """Merge a branch into out [B, H, Q, Dv] and lse [B, H, Q] in place."""
        scene, H = self.scene, self.queries.shape[1]
        places = torch.arange(H, device=out.device)
        for offset in range(dilation):
            heads = places[(places + first_head) % dilation == offset]
            for start, a, b in self.segments(size) if len(heads) else []:
                begin = a + (offset - scene.first - a) % dilation
                if begin >= b:
                    continue
                chosen = slice(begin, b, dilation)
                new = self._attend(heads, chosen, *self._past(heads, start, dilation, offset))
                at = torch.arange(begin, b, dilation, device=out.device)
                out[:, heads[:, None], at], lse[:, heads[:, None], at] = merge(
                    *new, out[:, heads[:, None], at], lse[:, heads[:, None], at]
                )

    def sinks(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """The piece of the first `count` tokens, for queries behind the first segment of `size` tokens."""
        scene, Q = self.scene, self.queries.shape[2]
        own = min(max(0, count - scene.first), Q)
        keys, values = [self.keys[:, :, :own]], [self.values[:, :, :own]]
        m = int(torch.searchsorted(self.positions, count))
        if self.stored is not None and m:
            keys.insert(0, self.stored[0][:, :, :m])
            values.insert(0, self.stored[1][:, :, :m])
            scene.read_bytes += sum(t.numel() * t.element_size() for t in (keys[0], values[0]))
        later = torch.arange(scene.first, scene.first + Q, device=self.queries.device)[None, None, :, None] >= size
        return attend_some(self.queries, torch.cat(keys, 2), torch.cat(values, 2), later, scene.scaling)

    def _past(
        self, heads: Tensor | slice, start: int, dilation: int, offset: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Stored keys and values from position `start` on, of one residue; for dilated branches by query head."""
        if self.stored is None:
            return None, None
        a = int(torch.searchsorted(self.positions, start))
        keys, values = self.stored[0][:, :, a:], self.stored[1][:, :, a:]
        if dilation > 1:
            slots = (self.positions[a:] % dilation == offset).nonzero()[:, 0]
            keys, values = self._by_head(keys, heads, slots), self._by_head(values, heads, slots)
        if keys.shape[2] == 0:
            return None, None
        self.scene.read_bytes += sum(t.numel() * t.element_size() for t in (keys, values))
        return keys, values

    def _attend(
        self, heads: Tensor | slice, chosen: slice, past_keys: Tensor | None, past_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        queries, keys, values = (t[:, :, chosen] for t in (self.queries, self.keys, self.values))
        if isinstance(heads, Tensor):
            queries, keys, values = queries[:, heads], self._by_head(keys, heads), self._by_head(values, heads)
        past = None if past_keys is None or past_values is None else (past_keys, past_values)
        return attend(queries, keys, values, past, self.scene.scaling, self.scene.backend)

    def _by_head(self, entries: Tensor, heads: Tensor | slice, slots: Tensor | None = None) -> Tensor:
        """The key/value entries [B, G, S, D] that some query heads read, [B, len(heads), S, D]; at some slots only."""
        if slots is not None:
            entries = entries.index_select(2, slots)
        return repeat(entries, self.scene.group)[:, heads]
