"""Block-sparse prefill: A-shape, vertical-slash and the top blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.block_choice import (
    antidiagonal_scores,
    crossed_blocks,
    mean_scores,
    top_with_forced,
    vertical_and_slash_scores,
)
from longfit.attention.blocks import (
    Grid,
    attend_blocks,
    attend_chosen_blocks,
    attend_stretches,
    attend_tokens,
)
from longfit.errors import InputError

FORCED_COLUMNS, FORCED_DIAGONALS, LAST_QUERIES = 30, 100, 64  # MInference's own
PATTERNS = ("a_shape", "vertical_slash", "block_topk")

Piece = tuple[Tensor, Tensor] | None


@dataclass
class BlockSparse(AttentionPatch):
    """Prefill in which a block of queries attends to few earlier keys; nothing is dropped and decoding is full.

    Jiang et al. 2024, "MInference 1.0", and Xu et al. 2025, "XAttention". Patterns run over what is stored and the
    chunk; a query's own block is always in, causally.

    - "a_shape": the first `sink_tokens` and a window of `window_tokens`, both in whole blocks, the own block included.
    - "vertical_slash": from the attention of the chunk's last 64 queries, the `vertical_tokens` heaviest columns (the
      first 30 always) and the `slash_tokens` heaviest diagonals (the last 100 always); blocks that a diagonal crosses
      are attended to in full, columns key by key.
    - "block_topk": the `top_blocks` best blocks of each block of queries, its own and the first among them, by the
      product of mean query and mean key (`estimate="mean"`, MInference) or by sums along antidiagonals `stride` apart
      (`estimate="antidiagonal"`, XAttention).

    Deviations: one pattern serves all heads, where MInference assigns one to each head offline. Estimates are made
    once a chunk of prefill, not once an input, so what they choose depends on the chunk size ("a_shape" does not).
    XAttention takes blocks up to a share of the estimated attention; here their number is fixed, and its softmax
    leaves the own block out. The papers' sizes are for inputs of 128k tokens; the defaults are for some thousands.
    """

    name = "block_sparse"
    source = "Jiang et al. 2024 (MInference), Xu et al. 2025 (XAttention)"
    summary = "prefill over few blocks: A-shape, vertical-slash or top blocks; decoding is full"
    phases = ("prefill",)
    alike_in_chunks = False  # a chunk is prefill, one token is not

    pattern: str = "block_topk"
    block_tokens: int = 64
    sink_tokens: int = 64
    window_tokens: int = 1024
    vertical_tokens: int = 256
    slash_tokens: int = 512
    top_blocks: int = 16
    estimate: str = "antidiagonal"
    stride: int = 16

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise InputError(f"{self.name}: pattern={self.pattern!r}; it is one of {', '.join(PATTERNS)}")
        if self.estimate not in ("mean", "antidiagonal"):
            raise InputError(f'{self.name}: estimate={self.estimate!r}; it is "mean" or "antidiagonal"')
        self._at_least(0, sink_tokens=self.sink_tokens)
        self._at_least(
            1,
            block_tokens=self.block_tokens,
            window_tokens=self.window_tokens,
            vertical_tokens=self.vertical_tokens,
            slash_tokens=self.slash_tokens,
            stride=self.stride,
        )
        self._at_least(2, top_blocks=self.top_blocks)
        strided = self.pattern == "block_topk" and self.estimate == "antidiagonal"
        if strided and self.block_tokens % self.stride:
            raise InputError(
                f"{self.name}: stride={self.stride} does not divide block_tokens={self.block_tokens}; "
                'choose one that does, or estimate="mean"'
            )

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        entries, b = kept + chunk, self.block_tokens
        grid = (2 * kv_heads * entries + query_heads * chunk) * key_dim * dtype_bytes
        if self.pattern == "vertical_slash":
            gathered, estimate = (
                2 * entries * key_dim * dtype_bytes,
                query_heads * entries * (LAST_QUERIES * 4 * 4 + 32),
            )
        elif self.pattern == "block_topk":
            gathered = 2 * query_heads * self.top_blocks * b * key_dim * dtype_bytes
            cells = self.stride if self.estimate == "antidiagonal" else b
            estimate = query_heads * (entries * key_dim * dtype_bytes * 2 + 3 * 4 * chunk * entries // cells**2)
        else:
            gathered, estimate = 2 * kv_heads * entries * key_dim * dtype_bytes, 0
        return grid + gathered + estimate

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        grid = Grid.of(scene, self.block_tokens)
        scene.read_bytes += sum(t.numel() * t.element_size() for t in (grid.keys, grid.values))
        by_pattern = {
            "a_shape": self._a_shape,
            "vertical_slash": self._vertical_slash,
            "block_topk": self._block_topk,
        }
        return attend_blocks(scene, grid, by_pattern[self.pattern](scene, grid))

    def _a_shape(self, scene: Scene, grid: Grid) -> list[Piece]:
        b = grid.block
        sinks, window = -(-self.sink_tokens // b), -(-self.window_tokens // b)
        earlier: list[Piece] = []
        for i in grid.query_blocks:
            near = max(0, i - window + 1)
            stretches = [slice(0, min(sinks, near) * b), slice(near * b, i * b)]
            stretches = [s for s in stretches if s.stop > s.start]
            earlier.append(attend_stretches(scene, grid, stretches, i) if stretches else None)
        return earlier

    def _vertical_slash(self, scene: Scene, grid: Grid) -> list[Piece]:
        b, S = grid.block, scene.stored + grid.count
        asking = scene.queries[:, :, -LAST_QUERIES:]
        by_column, by_distance = vertical_and_slash_scores(asking, grid.keys[:, :, :S], scene.scaling)
        columns = top_with_forced(by_column, self.vertical_tokens, FORCED_COLUMNS)
        back = crossed_blocks(top_with_forced(by_distance, self.slash_tokens, FORCED_DIAGONALS), b)
        earlier: list[Piece] = []
        for i in grid.query_blocks:
            blocks = back[..., 1 : i + 1].flip(-1)  # block j lies i - j back
            allowed = blocks.repeat_interleave(b, -1) | columns[..., : i * b]
            earlier.append(attend_tokens(scene, grid, allowed, i))
        return earlier

    def _block_topk(self, scene: Scene, grid: Grid) -> list[Piece]:
        numbers = torch.arange(grid.query_blocks.start, grid.query_blocks.stop, device=grid.keys.device)
        before = torch.arange(grid.query_blocks.stop, device=numbers.device) < numbers[:, None]
        if self.estimate == "mean":
            scores = mean_scores(grid.queries, grid.keys, grid.block, self._counts(scene, grid, numbers))
        else:
            scores = antidiagonal_scores(grid.queries, grid.keys, grid.block, self.stride, scene.scaling, before)
        scores[..., 0] = torch.inf
        earlier: list[Piece] = []
        for place, i in enumerate(grid.query_blocks):
            m = min(i, self.top_blocks - 1)
            if m == i:
                stretches = [slice(0, i * grid.block)]
                earlier.append(attend_stretches(scene, grid, stretches, i) if i else None)
                continue
            chosen = scores[:, :, place, :i].topk(m, sorted=False).indices
            earlier.append(attend_chosen_blocks(scene, grid, chosen, i))
        return earlier

    @staticmethod
    def _counts(scene: Scene, grid: Grid, numbers: Tensor) -> Tensor:
        """[M] queries in each block of queries."""
        starts = (numbers * grid.block).clamp(min=scene.stored)
        stops = ((numbers + 1) * grid.block).clamp(max=scene.stored + grid.count)
        return stops - starts
