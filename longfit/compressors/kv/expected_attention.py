"""Expected attention: what future queries will attend to, from the statistics of past ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_sinks, value_norms
from longfit.errors import UnsupportedModelError


@dataclass
class ExpectedAttention(KVCompressor):
    """Expected attention: queries before RoPE are taken as Gaussian; turned by the mean rotation of the next
    `future_tokens` positions, their mean m and covariance C give E exp(q k) = exp(k m s + k C k s^2 / 2) with the
    scaling s; softmax over candidates, mean over the group, times ||v|| (Devoto et al., 2025, arXiv:2510.00636,
    equations 3 to 7).

    The statistics run over all queries of all chunks (the first `sink_tokens` left out) in fp32, so that they are
    those of the whole input at its end. Un-rotated queries are the attention's own, rotated back.

    Args:
        future_tokens: positions over which the rotation is averaged.
        sink_tokens: first tokens that always stay.
        covariance: use the second order too.
        value_norm: multiply by the norm of the value.
        epsilon: added to the attention before that.
    """

    name = "expected_attention"
    source = "arXiv:2510.00636"
    summary = "keeps what future queries are expected to attend to"
    needs_queries = True
    observes = True
    state_names = ("count", "sum", "products")

    future_tokens: int = 512
    sink_tokens: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        self._at_least(1, future_tokens=self.future_tokens)
        self._at_least(0, sink_tokens=self.sink_tokens)

    @property
    def min_tokens(self) -> int:
        return self.sink_tokens + 1

    def layer_state_bytes(self, query_heads: int, head_dim: int, dtype_bytes: int) -> int:
        return 4 * query_heads * (head_dim * head_dim * self.covariance + head_dim + 1)

    def observe(self, view: View) -> None:
        if view.rotate is None:
            raise UnsupportedModelError("expected_attention needs a model with rotary positions")
        assert view.all_queries is not None and view.all_query_positions is not None
        queries = view.all_queries[:, :, : view.new]
        places = view.rotary_positions[: view.new].expand(queries.shape[:3])
        counted = view.all_query_positions[: view.new] >= self.sink_tokens
        plain = view.rotate(queries.float(), -places)[:, :, counted]
        state = view.state
        if "sum" not in state:
            B, H, _, D = plain.shape
            state["count"] = plain.new_zeros(B)
            state["sum"] = plain.new_zeros(B, H, D)
            if self.covariance:
                state["products"] = plain.new_zeros(B, H, D, D)
        state["count"] += plain.shape[2]
        state["sum"] += plain.sum(2)
        if self.covariance:
            state["products"] += plain.mT @ plain

    def score(self, view: View) -> Tensor:
        mean, covariance = self._future_queries(view)
        B, G, _, D = view.keys.shape
        keys, group = view.keys.float(), mean.shape[1] // G
        logits = torch.einsum("bgnd,bgsd->bgns", mean.view(B, G, group, D), keys) * view.scaling
        if covariance is not None:
            spread = torch.einsum("bgsi,bgnij->bgnsj", keys, covariance.view(B, G, group, D, D))
            logits += torch.einsum("bgnsj,bgsj->bgns", spread, keys) * (view.scaling**2 / 2)
        logits = logits.masked_fill((view.positions < self.sink_tokens)[:, :, None], float("-inf"))
        scores = logits.softmax(-1).mean(2)
        if self.value_norm:
            scores = (scores + self.epsilon) * value_norms(view)
        return keep_sinks(scores, view, self.sink_tokens)

    def _future_queries(self, view: View) -> tuple[Tensor, Tensor | None]:
        """Mean [B, H, D] and covariance [B, H, D, D] of the queries at the next positions."""
        count = view.state["count"].clamp(min=1)[:, None, None]
        mean = view.state["sum"] / count
        turn = self._mean_rotation(view, mean.shape[-1])
        if not self.covariance:
            return mean @ turn.T, None
        covariance = view.state["products"] / count[..., None] - mean[..., :, None] * mean[..., None, :]
        return mean @ turn.T, turn @ covariance @ turn.T

    def _mean_rotation(self, view: View, D: int) -> Tensor:
        """The mean over the next positions of the matrix that rotates a vector there, [D, D]."""
        assert view.rotate is not None
        basis = torch.eye(D, device=view.keys.device)
        turn = torch.zeros(D, D, device=view.keys.device)
        future = torch.arange(view.next_position, view.next_position + self.future_tokens, device=view.keys.device)
        for block in future.split(64):
            moved = view.rotate(basis.expand(1, len(block), D, D), block[None, :, None].expand(1, len(block), D))
            turn += moved.sum((0, 1))
        return (turn / self.future_tokens).T

    def score_workspace(self, query_heads: int, kv_heads: int, head_dim: int, chunk: int, kept: int) -> int:
        observing = 4 * 5 * query_heads * chunk * head_dim
        scoring = 4 * query_heads * (chunk + kept) * (head_dim + 3) if self.covariance else 0
        return max(observing, scoring)
