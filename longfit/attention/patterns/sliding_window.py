"""A sliding window and attention sinks."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longfit.attention.position import PositionPatch, Span


@dataclass
class SlidingWindow(PositionPatch):
    """Every token sees the first `sink_tokens` of the input and the last `window_tokens`, itself included.

    Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), as a mask: tokens keep
    the positions that they have in the input. The paper's positions within the cache are the `streaming_llm`
    compressor's. `sink_tokens=0` is the plain window of Longformer and Mistral.
    """

    name = "sliding_window"
    source = "Xiao et al. 2024 (StreamingLLM)"
    summary = "the first few tokens and a window of recent ones"

    window_tokens: int = 1024
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        self._at_least(1, window_tokens=self.window_tokens)
        self._at_least(0, sink_tokens=self.sink_tokens)

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"window_tokens": read_tokens + 1 - cls.sink_tokens}

    def spans(self, start: int, stop: int) -> list[Span]:
        return [(0, self.sink_tokens), (start - self.window_tokens + 1, stop)]

    def allowed(self, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        return (keys > queries - self.window_tokens) | (keys < self.sink_tokens)

    def reach(self, layer: int, layers: int) -> int:
        return self.sink_tokens + self.window_tokens - 1

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor:
        return (positions > seen - self.window_tokens) | (positions < self.sink_tokens)
