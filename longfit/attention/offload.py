"""Attention over more than the fast side holds: what leaves it goes to a slow tier and is brought back page by page."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.partial import merge
from longfit.attention.sight import Attended, Sight, attend_all
from longfit.cache import GROWTH, Shelf, SlowTier, Store, shelf_for
from longfit.cache.side_index import GROWTH_SLOTS
from longfit.errors import InputError, UnsupportedModelError


@dataclass
class OffloadingPatch(AttentionPatch):
    """Base of such patches. One says how entries that left are cut into pages (`cut`), by which vectors a page is
    found (`describe`) and which pages a block of queries asks for (`choose`).

    The first tokens and a window of recent ones stay on the fast side; beside a compressor, what that keeps of them.
    What leaves is appended to the tier of its row. A block of up to `query_tokens` queries (one, while decoding)
    attends to what is on the fast side and to the pages that it chose.

    Where the distance is limited, what is farther away than the window (sinks, pages) is attended to as if it were
    `window_tokens` away: its keys are kept without rotation and the queries rotated to that position. So no distance
    is larger than the window, however long the input. In the packed geometry every such patch does so for its pages.

    Attributes (options of every patch of this kind):
        sink_tokens, window_tokens: tokens at the start and at the end that stay on the fast side.
        block_tokens: entries of a page, at most.
        top_blocks: pages that a block of queries asks for.
        cached_blocks: pages that stay on the fast side for each head, least recently used first to go.
        query_tokens: queries of a prefill chunk that choose together.
        folder: where the slow side's file is made; None for the system's temporary folder, and for pinned host memory
            beside a GPU.
    """

    stores = "offloaded"
    alike_in_chunks = False  # a block of queries chooses pages together
    index_dims: ClassVar[int] = 1  # index vectors of a page, in keys per key/value head

    sink_tokens: int = 128
    window_tokens: int = 4096
    block_tokens: int = 128
    top_blocks: int = 16
    cached_blocks: int = 32
    query_tokens: int = 512
    folder: str | None = None

    def __post_init__(self) -> None:
        self._at_least(
            1,
            window_tokens=self.window_tokens,
            block_tokens=self.block_tokens,
            top_blocks=self.top_blocks,
            query_tokens=self.query_tokens,
        )
        self._at_least(0, sink_tokens=self.sink_tokens)
        if self.cached_blocks < self.asked_blocks:
            raise InputError(
                f"{self.name}: a step asks for {self.asked_blocks} blocks at once, cached_blocks={self.cached_blocks} "
                "is fewer"
            )

    # -- what a patch writes --------------------------------------------------------------------------------------

    def cut(self, tail: Store) -> list[int]:
        """Lengths of the pages to cut off the front of the tail; fewer than `block_tokens` entries may stay."""
        return [self.block_tokens] * (tail.n // self.block_tokens)

    def describe(self, keys: Tensor, scores: dict[str, Tensor]) -> Tensor:
        """The vectors [1, N, W] by which a page is found, from its keys [1, G, n, D] and `score_names` [1, G, n]."""
        raise NotImplementedError

    def choose(self, scene: Scene, tier: SlowTier, queries: Tensor) -> list[list[int]]:
        """Pages that queries [1, H, Q, D] ask for, as many for each of the G heads. Called where there are more than
        `top_blocks`."""
        raise NotImplementedError

    @property
    def asked_blocks(self) -> int:
        """The most pages that one block of queries asks for."""
        return self.top_blocks

    def bind(self, model: Any) -> None:
        """
        Raises:
            UnsupportedModelError: the model was trained on less than a window.
        """
        trained = model.config.get_text_config(decoder=True).max_position_embeddings
        if self.extends and self.window_tokens > trained:
            raise UnsupportedModelError(
                f"{self.name} attends to what is far away as if it were window_tokens={self.window_tokens:,} away, and "
                f"{type(model).__name__} was trained on {trained:,} tokens; give a smaller window_tokens"
            )

    # -- accounts -------------------------------------------------------------------------------------------------

    @property
    def brought_tokens(self) -> int:
        """Entries for which the slow tier takes room on the fast side: the pages brought in and the tail."""
        return (self.cached_blocks + 1) * self.block_tokens

    def reach(self, layer: int, layers: int) -> int:
        return self.sink_tokens + self.window_tokens - 1 + self.brought_tokens

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor:
        return (positions > seen - self.window_tokens) | (positions < self.sink_tokens)

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        pages = -(-tokens // self.block_tokens)
        slots = pages + max(GROWTH_SLOTS, pages // GROWTH) if pages else 0
        return slots * self.index_dims * kv_heads * key_dim * dtype_bytes

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        """Bytes of one block of queries: what it attends to joined and repeated, masks, rotated queries."""
        block, entries = min(chunk, self.query_tokens), kept + chunk
        joined = 2 * (kv_heads + query_heads) * entries * key_dim * dtype_bytes
        return joined + block * entries * (2 + dtype_bytes) + 7 * query_heads * block * key_dim * 4

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        share = read_tokens // 16
        if share < 1:
            raise InputError(f"{cls.name}: read_tokens has to be at least 16, got {read_tokens}")
        # 1/16 sinks, 4/16 pages, 1/16 entries in no page yet; the rest is window, with the room that decoding runs in.
        window = (read_tokens - 6 * share) * 15 // 16
        sizes = {"sink_tokens": share, "window_tokens": window, "block_tokens": share}
        return {**sizes, "top_blocks": 4, "cached_blocks": 8}

    # -- the tier -------------------------------------------------------------------------------------------------

    def limits_distance(self, packed: bool) -> bool:
        """Whether far keys are kept without rotation and attended to at `window_tokens`."""
        return self.extends or packed

    def shelf(self, device: torch.device) -> Shelf:
        """The slow side of one cache."""
        return shelf_for(device, self.folder)

    def tier(self, shelf: Shelf) -> SlowTier:
        """An empty tier of one row."""
        return SlowTier(shelf, self.block_tokens, self.cached_blocks)

    def release(self, tier: SlowTier, entries: Store) -> None:
        """Take entries that leave the fast side. Called by the layer before it drops them."""
        tier.receive(entries)
        assert tier.tail is not None
        start = 0
        for length in self.cut(tier.tail):
            span = slice(start, start + length)
            scores = {name: t[:, :, span] for name, t in tier.tail.scores.items()}
            tier.put_away(span, self.describe(tier.tail.keys[:, :, span], scores))
            start += length
        if start:
            tier.forget(start)

    # -- attention ------------------------------------------------------------------------------------------------

    def attend(self, scene: Scene) -> Attended:
        Q, step = scene.queries.shape[2], min(self.query_tokens, self.window_tokens)
        blocks = [self._block(scene, start, min(start + step, Q)) for start in range(0, Q, step)]
        if len(blocks) == 1:
            return blocks[0]
        return torch.cat([out for out, _ in blocks], 2), torch.cat([lse for _, lse in blocks], 2)

    def _block(self, scene: Scene, start: int, stop: int) -> Attended:
        """Attention of the new tokens start to stop."""
        queries, tier = scene.queries[:, :, start:stop], scene.part.tier
        limited = self.limits_distance(scene.packed)
        far_queries = queries if not limited else self._at_the_window(scene, queries, start)
        pages: list[list[int]] = []
        if tier is not None and tier.pages:
            pages = self._pages(tier, far_queries, scene)
            tier.ask(pages)
        sight = Sight.of(scene, start, stop, self.window_tokens if limited and not scene.packed else None)
        attended = sight.near(scene, queries, start, stop)
        far = self._far(scene, sight, far_queries, pages)
        return attended if far is None else merge(*far, *attended)

    def _pages(self, tier: SlowTier, queries: Tensor, scene: Scene) -> list[list[int]]:
        if tier.pages <= self.top_blocks:
            return [list(range(tier.pages))] * scene.keys.shape[1]
        assert tier.index is not None
        scene.read_bytes += tier.index.used.numel() * tier.index.used.element_size()
        return self.choose(scene, tier, queries)

    def _at_the_window(self, scene: Scene, queries: Tensor, start: int) -> Tensor:
        """Queries [1, H, Q, D] of the chunk, from `start`, moved to the rotary position `window_tokens`."""
        if scene.rotate is None:
            return queries
        first = scene.first_rotary + start
        places = torch.arange(first, first + queries.shape[2], device=queries.device)
        return scene.rotate(queries, (self.window_tokens - places).expand(queries.shape[:3]))

    def _far(self, scene: Scene, sight: Sight, queries: Tensor, pages: list[list[int]]) -> Attended | None:
        """Attention to the tail, the pages brought in and what is stored beyond the window; None where there is none.

        Queries as the far keys want them.
        """
        found = sight.beyond(scene)
        beyond = len(found)  # counted with what is stored
        tier = scene.part.tier
        if tier is not None and tier.tail is not None and tier.tail.n:
            found.append((tier.tail.keys, tier.tail.values, None))
        if tier is not None and pages:
            keys, values, filled = tier.brought(pages)
            found.append((keys, values, None if filled is None else filled.unsqueeze(2)))
        if not found:
            return None
        scene.read_bytes += sum(keys.nbytes + values.nbytes for keys, values, _ in found[beyond:])
        return attend_all(scene, queries, found)
