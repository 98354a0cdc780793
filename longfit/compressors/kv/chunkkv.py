"""ChunkKV: whole spans of tokens, not scattered ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import Wrapper
from longfit.errors import InputError


@dataclass
class ChunkKV(Wrapper):
    """ChunkKV: candidates are cut into spans of `span_tokens`; a span's score is the mean over its tokens of the
    scorer's score summed over heads, and whole spans stay, the same for all heads (Liu et al., 2025, arXiv:2502.00299,
    section 3.2).

    Deviation: the paper keeps a whole number of spans, which may be fewer or more entries than asked for; here the
    last span is filled from its start until the budget is used to the entry.

    Args:
        scorer: any plain scorer, by name or as an object.
        span_tokens: length of a span.
    """

    name = "chunkkv"
    source = "arXiv:2502.00299"
    summary = "keeps whole spans of tokens, around any scorer"

    span_tokens: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span_tokens < 1:
            raise InputError(f"chunkkv: span_tokens has to be at least 1, got {self.span_tokens}")

    def select(self, views: list[View], scores: list[Tensor], n_keep: int) -> list[Tensor]:
        (given,) = scores
        B, G, S = given.shape
        spans = torch.arange(S, device=given.device) // self.span_tokens
        total = given.sum(1)
        sums = total.new_zeros(B, int(spans[-1]) + 1).index_add_(1, spans, total)
        means = sums / spans.bincount().to(sums.dtype)
        ranks = means.argsort(-1, descending=True).argsort(-1)
        order = ranks[:, spans] * S + torch.arange(S, device=given.device)
        kept = order.topk(n_keep, dim=-1, largest=False).indices
        return [kept[:, None].expand(B, G, n_keep)]
