"""SnapKV: what the last queries attend to."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_last


@dataclass
class SnapKV(KVCompressor):
    """SnapKV: score = attention of an observation window of last queries, averaged over the window, smoothed along the
    sequence, averaged over the heads that share a key/value head; the window stays (Li et al., NeurIPS 2024,
    arXiv:2404.14469, section 4; the mean over groups is FasterDecoding/SnapKV#22).

    Chunk by chunk the window is each chunk's last queries, so the choice depends on the chunk size. Where the question
    is known, its queries are the window, for every chunk.

    Args:
        window_tokens: size of the observation window.
        kernel_size: width of the average pooling (odd).
    """

    name = "snapkv"
    source = "arXiv:2404.14469"
    summary = "keeps what the last queries (or the question's) attend to"
    needs_queries = True
    query_aware = True

    window: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        self._at_least(1, window=self.window, kernel_size=self.kernel_size)

    @property
    def window_tokens(self) -> int:
        return self.window

    @property
    def min_tokens(self) -> int:
        return self.window

    def score(self, view: View) -> Tensor:
        attention = view.window_attention()
        own = 0 if view.probe_keys is not None else min(attention.shape[3], view.size)
        past = attention[..., : view.size - own].mean(-2)
        B, G, group, S = past.shape
        pooled = F.avg_pool1d(past.reshape(B, G * group, S), self.kernel_size, 1, self.kernel_size // 2) if S else past
        scores = pooled[..., :S].reshape(B, G, group, S).mean(2)
        return keep_last(F.pad(scores, (0, own)), own)
