"""Ltri-LLM: spans found as triangles of the attention map."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.offload import OffloadingPatch
from longfit.attention.spans import band, span_starts
from longfit.cache import SlowTier, Store

START, LOCAL = "span_start", "local_attention"


@dataclass
class Ltri(OffloadingPatch):
    """Pages are spans whose tokens look at each other, found in the attention of each chunk.

    After Tang et al. 2024, "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular
    Attention Pattern": spans are triangles of high attention along the diagonal, found by a score and non-maximum
    suppression; a span has index vectors; heads vote for spans; spans recalled lately stay.

    No code was published, so all of the following is ours. A span is `min_span_tokens` to `block_tokens` long, powers
    of two between; its score is the mean attention that stays in it less that on as many tokens before it; what no
    triangle covers is a span, too, and tokens that came while decoding are cut at `block_tokens`. A span has two index
    vectors for each key/value head, the mean of its keys (static) and their mean weighted by the attention received
    within the chunk (dynamic). Each query head votes with a softmax over all spans of the larger of its two products,
    the votes are summed over heads, and the same spans are brought in for all. The `recent_blocks` spans recalled last
    come with them. Spans do not cross chunks. Distances are limited as in InfLLM, on whose streaming it builds.
    """

    name = "ltri"
    source = "Tang et al. 2024 (Ltri-LLM)"
    summary = "offloaded spans from triangular attention patterns, brought in by vote; past the trained window"
    extends = True
    score_names = (START, LOCAL)
    index_dims = 2

    min_span_tokens: int = 16
    recent_blocks: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, min_span_tokens=self.min_span_tokens)
        self._at_least(0, recent_blocks=self.recent_blocks)

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return super().reading(read_tokens) | {"top_blocks": 3, "recent_blocks": 1}

    @property
    def asked_blocks(self) -> int:
        return self.top_blocks + self.recent_blocks

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = super().attend(scene)
        if scene.queries.shape[2] > 1:
            width = 2 * self.block_tokens
            attention = band(scene.queries, scene.keys, log_sum_exp, scene.scaling, width)
            starts = torch.zeros(scene.keys.shape[:3], device=attention.device)
            starts[:, :, span_starts(attention, self.min_span_tokens, self.block_tokens)] = 1.0
            scene.new_scores = {START: starts, LOCAL: _columns(attention).expand_as(starts)}
        return out, log_sum_exp

    def cut(self, tail: Store) -> list[int]:
        """Whole spans; one of which some is still in the window only where it fills a page."""
        edges = [0, *tail.scores[START][0, 0].nonzero()[:, 0].tolist(), tail.n]
        lengths = []
        for start, stop in itertools.pairwise(edges):
            whole, rest = divmod(stop - start, self.block_tokens)
            lengths += [self.block_tokens] * whole
            if rest and stop < tail.n:
                lengths.append(rest)
        return lengths

    def describe(self, keys: Tensor, scores: dict[str, Tensor]) -> Tensor:
        weights = scores[LOCAL] + torch.finfo(torch.float32).eps
        weighted = (keys.float() * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)).sum(2)
        return torch.cat([keys.float().mean(2), weighted], -1).to(keys.dtype)

    def choose(self, scene: Scene, tier: SlowTier, queries: Tensor) -> list[list[int]]:
        assert tier.index is not None
        static, dynamic = tier.index.used.float().chunk(2, -1)  # [1, G, pages, D]
        G, D = static.shape[1], static.shape[-1]
        asked = queries.float().mean(2).view(1, G, -1, D)
        products = torch.maximum(torch.matmul(asked, static.mT), torch.matmul(asked, dynamic.mT))
        votes = (products * scene.scaling).softmax(-1).sum((0, 1, 2))
        best = votes.topk(self.top_blocks).indices.tolist()
        recent = [page for page in tier.recent if page not in best][: self.recent_blocks]
        tier.recent = best + recent
        return [best + recent] * G

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        bands = 6 * chunk * 2 * self.block_tokens * 8
        return max(super().workspace(kv_heads, query_heads, key_dim, dtype_bytes, chunk, kept), bands)


def _columns(attention: Tensor) -> Tensor:
    """Attention [Q] that each token received, from a band [Q, width]."""
    Q, width = attention.shape
    places = torch.arange(Q, device=attention.device)[:, None] - torch.arange(width, device=attention.device)
    received = torch.zeros(Q, device=attention.device)
    return received.index_add_(0, places.clamp(min=0).reshape(-1), attention.reshape(-1))
