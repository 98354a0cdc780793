"""H2O: heavy hitters by accumulated attention, and the most recent tokens."""

from dataclasses import dataclass

from torch import Tensor

from longfit.cache import View
from longfit.cache.view import QUERY_BLOCK
from longfit.compressors.base import KVCompressor, keep_last


@dataclass
class H2O(KVCompressor):
    """H2O: keep what has received most attention from all queries so far, and a share of most recent tokens (Zhang et
    al., NeurIPS 2023, arXiv:2306.14048, algorithm 1).

    The attention received is summed over every query of every chunk and of decoding, from the log-sum-exp of the
    attention kernel, so that the attention matrix never exists and sdpa and flash attention work. Heads that share a
    key/value head are averaged (the paper has none).

    Args:
        recent_ratio: share of the kept entries that are simply the most recent (the paper: half).
        average: divide by the number of queries that could attend to the entry; the paper sums, which favours the
            start of the input.
    """

    name = "h2o"
    source = "arXiv:2306.14048"
    summary = "heavy hitters by accumulated attention, and the most recent tokens"
    needs_queries = True
    observes = True
    score_names = ("attention_received",)

    recent_ratio: float = 0.5
    average: bool = False

    def __post_init__(self) -> None:
        self._at_least(0, recent_ratio=self.recent_ratio)

    def observe(self, view: View) -> None:
        view.scores["attention_received"] += view.column_mass().mean(2)

    def score(self, view: View) -> Tensor:
        received = view.scores["attention_received"]
        if self.average:
            received = received / (view.seen - view.positions).clamp(min=1)
        return keep_last(received.clone(), int(self.recent_ratio * view.n_keep))

    def score_workspace(self, query_heads: int, kv_heads: int, head_dim: int, chunk: int, kept: int) -> int:
        return 4 * 3 * query_heads * QUERY_BLOCK * (chunk + kept) + 4 * 4 * kv_heads * (chunk + kept)
