"""Zebra: a few layers see everything, the others a window."""

from dataclasses import dataclass

from longfit.attention.interleaved import InterleavedPatch


@dataclass
class Zebra(InterleavedPatch):
    """The first of every `global_every` layers attends fully, the others to a window of recent tokens.

    Song et al. 2023, "Zebra: Extending Context Window with Layerwise Grouped Local-Global Attention": groups of layers
    that begin with a global one. The paper trains the model so; here it is a mask over a pretrained one, and the
    attention sinks of the local layers, which a pretrained model needs, are ours (`sink_tokens=0` is the paper's).
    Only the local layers drop what they cannot see again: memory grows with the input in the global ones.
    """

    name = "zebra"
    source = "Song et al. 2023 (Zebra)"
    summary = "every few layers one that sees everything, between them a window and sinks"

    def covers(self, layer: int, layers: int) -> bool:
        return not self.is_global(layer)
