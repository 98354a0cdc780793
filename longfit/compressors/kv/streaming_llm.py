"""StreamingLLM: attention sinks and the most recent tokens."""

from dataclasses import dataclass

from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_sinks


@dataclass
class StreamingLLM(KVCompressor):
    """StreamingLLM: keep the first `sink_tokens` and the most recent entries, numbered anew (Xiao et al., ICLR 2024,
    arXiv:2309.17453, section 3.2).

    Positions are those inside the cache, as in the paper, so inputs may be longer than the model's window.

    Args:
        sink_tokens: first tokens that always stay.
    """

    name = "streaming_llm"
    source = "arXiv:2309.17453"
    summary = "attention sinks and the most recent tokens"
    geometry = "packed"

    sink_tokens: int = 4

    def __post_init__(self) -> None:
        self._at_least(0, sink_tokens=self.sink_tokens)

    @property
    def min_tokens(self) -> int:
        return self.sink_tokens + 1

    def score(self, view: View) -> Tensor:
        return keep_sinks(view.positions.float(), view, self.sink_tokens)
