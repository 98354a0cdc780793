"""Attention of a chunk on a grid of blocks: each block of queries attends to the blocks or tokens chosen for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.partial import merge, piece, repeat


@dataclass
class Grid:
    """Keys, values and queries of a scene laid out in blocks of `block` tokens, counted from the first stored entry.

    Stored entries and the chunk are one sequence of n + Q slots. Blocks are counted by slot, so that the grid is the
    same however the input is cut into chunks, as long as nothing was dropped. What is not there is zero: query slots
    before the chunk in its first block, and everything behind the chunk in its last.

    Attributes:
        block: tokens of a block, b.
        keys, values: [B, G, N * b, D] and [B, G, N * b, Dv], N blocks in all.
        queries: [B, H, M * b, D], the last M blocks.
        first: N - M, the block in which the chunk starts.
        lead, count: empty query slots before the chunk in that block; Q.
    """

    block: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    first: int
    lead: int
    count: int

    @classmethod
    def of(cls, scene: Scene, block: int) -> "Grid":
        Q, n = scene.queries.shape[2], scene.stored
        first, lead = divmod(n, block)
        blocks = -(-(n + Q) // block)
        return cls(
            block=block,
            keys=_laid_out([scene.stored_keys, scene.keys], 0, blocks * block),
            values=_laid_out([scene.stored_values, scene.values], 0, blocks * block),
            queries=_laid_out([scene.queries], lead, (blocks - first) * block),
            first=first,
            lead=lead,
            count=Q,
        )

    @property
    def query_blocks(self) -> range:
        """Numbers of the blocks in which there are queries."""
        return range(self.first, self.keys.shape[2] // self.block)

    def queries_of(self, number: int) -> Tensor:
        """The queries [B, H, b, D] of a block."""
        start = (number - self.first) * self.block
        return self.queries[:, :, start : start + self.block]

    def whole_blocks(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [B * G * N, b * D] and [B * G * N, b * Dv], one row a block."""
        return tuple(t.view(-1, self.block * t.shape[-1]) for t in (self.keys, self.values))  # type: ignore[return-value]

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, m * b, D] of the blocks with the numbers `blocks` [B, H, m] of each query head."""
        B, H, m = blocks.shape
        G, N = self.keys.shape[1], self.keys.shape[2] // self.block
        heads = torch.arange(B * H, device=blocks.device).view(B, H, 1) // (H // G)
        rows = (heads * N + blocks).reshape(-1)
        keys, values = (t.index_select(0, rows).view(B, H, m * self.block, -1) for t in self.whole_blocks())
        return keys, values


def attend_blocks(scene: Scene, grid: Grid, earlier: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Every query attends causally to its own block, and to what was attended to in earlier blocks.

    Args:
        scene: gives scaling and backend.
        grid: its queries, keys and values.
        earlier: for each block of queries, attention to keys of earlier blocks: out [B, H, b, Dv] and log-sum-exp
            [B, H, b]; None where there is none.

    Returns:
        out [B, H, Q, Dv] and log-sum-exp [B, H, Q] in fp32.
    """
    own, own_lse = _diagonal(grid, scene)
    outs, lses = [], []
    for place, past in enumerate(earlier):
        span = slice(place * grid.block, (place + 1) * grid.block)
        out, lse = own[:, :, span], own_lse[:, :, span]
        if past is not None:
            out, lse = merge(*past, out, lse)
        outs.append(out)
        lses.append(lse)
    wanted = slice(grid.lead, grid.lead + grid.count)
    return torch.cat(outs, 2)[:, :, wanted], torch.cat(lses, 2)[:, :, wanted]


def attend_chosen_blocks(scene: Scene, grid: Grid, chosen: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """A block of queries attends to earlier blocks `chosen` [B, H, m]; out and log-sum-exp of the block."""
    keys, values = grid.gather(chosen)
    return piece(grid.queries_of(number), keys, values, False, scene.scaling, scene.backend)


def attend_stretches(scene: Scene, grid: Grid, stretches: list[slice], number: int) -> tuple[Tensor, Tensor]:
    """A block of queries of all heads attends to the same stretches of earlier slots; no key is repeated for it."""
    B, H, b, D = grid.queries_of(number).shape
    G = grid.keys.shape[1]
    keys = torch.cat([grid.keys[:, :, stretch] for stretch in stretches], 2)
    values = torch.cat([grid.values[:, :, stretch] for stretch in stretches], 2)
    packed = grid.queries_of(number).reshape(B, G, H // G * b, D)
    out, lse = piece(packed, keys, values, False, scene.scaling, scene.backend)
    return out.reshape(B, H, b, -1), lse.reshape(B, H, b)


def attend_tokens(scene: Scene, grid: Grid, allowed: Tensor, number: int) -> tuple[Tensor, Tensor] | None:
    """A block of queries attends to the earlier slots where `allowed` [B, H, S]; every head gathers its own.

    Heads see different numbers of keys, so each is a call of its own: no key is read under a mask.
    """
    if not bool(allowed.any()):
        return None
    queries, group = grid.queries_of(number), grid.queries.shape[1] // grid.keys.shape[1]
    B, H, b, _ = queries.shape
    out = queries.new_zeros(B, H, b, grid.values.shape[-1])
    lse = torch.full((B, H, b), float("-inf"), device=queries.device)
    for row in range(B):
        for head in range(H):
            slots = allowed[row, head].nonzero().squeeze(-1)
            if slots.numel() == 0:
                continue
            keys = grid.keys[row, head // group].index_select(0, slots)[None, None]
            values = grid.values[row, head // group].index_select(0, slots)[None, None]
            asking = queries[row : row + 1, head : head + 1]
            given = piece(asking, keys, values, False, scene.scaling, scene.backend)
            out[row, head], lse[row, head] = given[0][0, 0], given[1][0, 0]
    return out, lse


def _diagonal(grid: Grid, scene: Scene) -> tuple[Tensor, Tensor]:
    """Causal attention of every block of queries to itself, all blocks in one call."""
    start, b = grid.first * grid.block, grid.block
    group = grid.queries.shape[1] // grid.keys.shape[1]

    def folded(t: Tensor) -> Tensor:  # [B, H, M * b, D] to [B * M, H, b, D]
        return t.unflatten(2, (-1, b)).transpose(1, 2).flatten(0, 1)

    def unfolded(t: Tensor) -> Tensor:
        return t.unflatten(0, (grid.queries.shape[0], -1)).transpose(1, 2).flatten(2, 3)

    keys, values = (repeat(folded(t[:, :, start:]), group) for t in (grid.keys, grid.values))
    out, lse = piece(folded(grid.queries), keys, values, True, scene.scaling, scene.backend)
    return unfolded(out), unfolded(lse)


def _laid_out(pieces: list[Tensor | None], start: int, slots: int) -> Tensor:
    """Pieces [B, N, S, D] one behind the other from slot `start` of `slots`, zeros around them."""
    there = [t for t in pieces if t is not None]
    laid = there[0].new_empty(*there[0].shape[:2], slots, there[0].shape[-1])
    laid[:, :, :start] = 0
    for t in there:
        laid[:, :, start : start + t.shape[2]] = t
        start += t.shape[2]
    laid[:, :, start:] = 0
    return laid
