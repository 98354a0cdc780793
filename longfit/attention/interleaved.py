"""Patterns in which some layers see everything and the others a window."""

from dataclasses import dataclass

from torch import Tensor

from longfit.attention.position import PositionPatch, Span


@dataclass
class InterleavedPatch(PositionPatch):
    """Base of patterns whose layers differ: the first of every `global_every` layers is global, the others local.

    Layers are counted among all layers of the model, so that in a hybrid model its own sliding layers count too.

    Attributes (options):
        window_tokens: last tokens that a query of a local layer sees, itself included.
        sink_tokens: first tokens of the input that it sees as well.
        global_every: distance from one global layer to the next; 0 for none.
    """

    window_tokens: int = 512
    sink_tokens: int = 4
    global_every: int = 4

    def __post_init__(self) -> None:
        self._at_least(1, window_tokens=self.window_tokens)
        self._at_least(0, sink_tokens=self.sink_tokens, global_every=self.global_every)

    def is_global(self, layer: int) -> bool:
        """Whether the layer sees everything."""
        return self.global_every > 0 and layer % self.global_every == 0

    def spans(self, start: int, stop: int) -> list[Span]:
        return [(0, self.sink_tokens), (start - self.window_tokens + 1, stop)]

    def allowed(self, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        return (keys > queries - self.window_tokens) | (keys < self.sink_tokens)

    def reach(self, layer: int, layers: int) -> int | None:
        return None if self.is_global(layer) else self.sink_tokens + self.window_tokens - 1

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor | None:
        if self.is_global(layer):
            return None
        return (positions > seen - self.window_tokens) | (positions < self.sink_tokens)
