"""FINCH: the question chooses, chunk by chunk."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_last


@dataclass
class Finch(KVCompressor):
    """FINCH: each chunk is read with the question behind it; what the question attends to in the chunk and in what is
    kept so far stays, and is numbered anew (Corallo and Papotti, TACL 2024, section 3).

    The question is what `generate(..., question_tokens=n)` says; without it, the last `window` tokens of each chunk
    stand in. Each query's attention is weighted by the number of keys it could see (the paper's normalisation). While
    decoding, what the question said still decides; new tokens stay.

    Args:
        window: last queries that stand in for a question that is not known.
        normalize: weight each query by the number of keys that it sees.
        kernel_size: width of an average pooling along the sequence (odd); the paper has none (1). A wider one keeps
            the neighbours of what the question attends to, which matters where an answer is many small tokens.
    """

    name = "finch"
    source = "TACL 2024, 10.1162/tacl_a_00716"
    summary = "keeps what the question attends to, chunk by chunk, numbered anew"
    needs_queries = True
    query_aware = True
    persists = True
    geometry = "packed"

    window: int = 64
    normalize: bool = True
    kernel_size: int = 1

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
        if self.normalize:
            assert view.query_positions is not None
            attention = attention * view.query_positions[:, None]
        past = attention[..., : view.size - own].mean((-3, -2))
        if self.kernel_size > 1 and past.shape[-1]:
            past = F.avg_pool1d(past, self.kernel_size, 1, self.kernel_size // 2)[..., : past.shape[-1]]
        return keep_last(F.pad(past, (0, own)), own)
