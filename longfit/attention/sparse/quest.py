"""Quest: pages of keys, bounded channel by channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention import kernels
from longfit.attention.base import Scene
from longfit.attention.select import SelectingPatch, attend_selected
from longfit.cache.products import dot_products
from longfit.cache.side_index import Rows, SideIndex
from longfit.errors import InputError

FEWEST_PAGES = 3


@dataclass
class Quest(SelectingPatch):
    """Attends to the pages of keys that could hold the highest dot product.

    Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference": of every page of
    consecutive keys, as rotated, the smallest and the largest value of each channel are kept; a page's score is the
    bound sum over d of max(q_d min_d, q_d max_d) on the dot products within it. A step attends to whole pages, to
    `top_tokens / page_tokens` of them and 3 at least, among them always the unfinished page at the end; where pages are
    complete, the unfinished one holds nothing but the new token, which is attended to anyway. The first two layers
    stay full.

    A page holds neighbours in the store; a compressor that drops entries between them makes pages of what is left.
    Sinks and recent tokens, if asked for, are taken with their whole pages.

    Raises:
        InputError: `page_tokens` does not divide `top_tokens`, or the sinks and recent tokens fill more pages.
    """

    name = "quest"
    source = "Tang et al. 2024 (Quest)"
    summary = "whole pages of keys, by the bounds of each channel"

    page_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, page_tokens=self.page_tokens)
        if self.top_tokens % self.page_tokens:
            below = self.top_tokens // self.page_tokens * self.page_tokens
            fits = " or ".join(str(tokens) for tokens in (below, below + self.page_tokens) if tokens)
            raise InputError(
                f"quest reads whole pages: top_tokens={self.top_tokens} is no multiple of page_tokens="
                f"{self.page_tokens}; top_tokens={fits} would do, or a page size that divides it"
            )
        forced = -(-self.sink_tokens // self.page_tokens) + -(-self.recent_tokens // self.page_tokens)
        if forced + (self.recent_tokens > 1) > self.pages:
            raise InputError(
                f"quest: {self.sink_tokens} sinks and {self.recent_tokens} recent tokens can lie on more than the "
                f"{self.pages} pages that a step reads; raise top_tokens"
            )

    @property
    def pages(self) -> int:
        """Pages that a step attends to."""
        return max(FEWEST_PAGES, self.top_tokens // self.page_tokens)

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        return 2 * key_dim * dtype_bytes / self.page_tokens

    def estimate(self, scene: Scene) -> Tensor:
        """The pages' bounds, [B, G, H // G, pages]."""
        if not isinstance(scene.part.index, PageIndex):
            scene.part.index = PageIndex(self.page_tokens)
        index, store = scene.part.index, scene.part.store
        assert store is not None
        index.follow(store)
        bounds = index.bounds.used
        scene.read_bytes += bounds.numel() * bounds.element_size()
        B, _, G, D = *scene.queries.shape[:2], bounds.shape[1], scene.queries.shape[-1]
        queries = scene.queries.reshape(B, G, -1, D)
        return dot_products(torch.cat([queries.clamp(max=0), queries.clamp(min=0)], -1), bounds)

    def choose(self, scene: Scene) -> Tensor:
        scores, page, n = self.estimate(scene), self.page_tokens, scene.stored
        if self.share == "group":
            scores = scores.amax(2)
        scores = scores.reshape(scores.shape[0], -1, scores.shape[-1])
        scores[..., : -(-self.sink_tokens // page)] = torch.inf
        if self.recent_tokens:
            scores[..., (n - self.recent_tokens) // page :] = torch.inf
        complete, rest = n // page, n % page
        chosen = kernels.select_top(scores[..., :complete], self.pages - (rest > 0))
        slots = (chosen.unsqueeze(-1) * page + torch.arange(page, device=chosen.device)).flatten(-2)
        unfinished = torch.arange(complete * page, n, device=slots.device).expand(*slots.shape[:2], -1)
        return torch.cat([slots, unfinished], -1)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if scene.queries.shape[2] != 1 or scene.stored <= self.pages * self.page_tokens:
            return scene.full()
        return attend_selected(scene, self.choose(scene))


class PageIndex(SideIndex):
    """Smallest and largest value of each channel of every page of slots: bounds [B, G, pages, 2 D]."""

    bounds: Rows

    def __init__(self, page_tokens: int) -> None:
        super().__init__()
        self.page_tokens = page_tokens

    def build(self, keys: Tensor) -> None:
        self.bounds = Rows(self._bounds(keys))

    def extend(self, keys: Tensor) -> None:
        room = -self.n % self.page_tokens
        if room:
            last, new = self.bounds.used[:, :, -1], self._bounds(keys[:, :, :room])[:, :, 0]
            D = keys.shape[-1]
            last[..., :D] = torch.minimum(last[..., :D], new[..., :D])
            last[..., D:] = torch.maximum(last[..., D:], new[..., D:])
        if keys.shape[2] > room:
            self.bounds.append(self._bounds(keys[:, :, room:]))

    def _bounds(self, keys: Tensor) -> Tensor:
        """Of keys [B, G, m, D] from the start of a page on: [B, G, ceil(m / page), 2 D]."""
        B, G, m, D = keys.shape
        whole = m // self.page_tokens * self.page_tokens
        groups = [keys[:, :, :whole].reshape(B, G, -1, self.page_tokens, D), keys[:, :, None, whole:]]
        return torch.cat([torch.cat([g.amin(3), g.amax(3)], -1) for g in groups if g.numel()], 2)

    @property
    def nbytes(self) -> int:
        return self.bounds.nbytes
