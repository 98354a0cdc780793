"""LagKV: entries that stand out against the block that follows them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_sinks


@dataclass
class LagKV(KVCompressor):
    """LagKV: in blocks of `lag_tokens`, keys and values are scaled by the minimum and maximum of the next block; the
    score is the softmax over the block of their standard deviation over channels, keys and values averaged, ranked
    within the block (Liang et al., 2025, arXiv:2504.04704, equations 2 to 6). Needs no queries.

    Deviation: ranks of different blocks tie by construction; here the more recent entry wins the tie.

    Args:
        sink_tokens: first tokens that always stay.
        lag_tokens: block size; the last block and what follows it always stay.
    """

    name = "lagkv"
    source = "arXiv:2504.04704"
    summary = "keeps keys and values that stand out against the next block"

    sink_tokens: int = 4
    lag_tokens: int = 128

    def __post_init__(self) -> None:
        self._at_least(0, sink_tokens=self.sink_tokens)
        self._at_least(2, lag_tokens=self.lag_tokens)

    @property
    def min_tokens(self) -> int:
        return self.sink_tokens + 1

    def score(self, view: View) -> Tensor:
        B, G, S, _ = view.keys.shape
        recency = torch.linspace(0.0, 0.5 / self.lag_tokens, S, device=view.keys.device)
        blocks = (S - self.sink_tokens) // self.lag_tokens
        if blocks < 2:
            return keep_sinks(recency.expand(B, G, S).clone(), view, self.sink_tokens)
        body = slice(self.sink_tokens, self.sink_tokens + blocks * self.lag_tokens)
        spread = (self._spread(view.keys[:, :, body]) + self._spread(view.values[:, :, body])) / 2
        ranks = spread.argsort(-1).argsort(-1) / self.lag_tokens
        scores = torch.ones(B, G, S, device=view.keys.device)
        scores[:, :, self.sink_tokens : body.stop - self.lag_tokens] = ranks.flatten(2)
        return keep_sinks(scores + recency, view, self.sink_tokens)

    def _spread(self, states: Tensor) -> Tensor:
        """[B, G, blocks - 1, lag] from states [B, G, blocks * lag, D]."""
        B, G, _, D = states.shape
        states = states.float().view(B, G, -1, self.lag_tokens, D)
        block, following = states[:, :, :-1], states[:, :, 1:]
        low, high = following.amin(-2, keepdim=True), following.amax(-2, keepdim=True)
        return ((block - low) / (high - low).clamp(min=1e-9)).std(-1).softmax(-1)
