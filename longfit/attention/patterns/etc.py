"""ETC's global-local attention, over a plain decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.global_tokens import GlobalTokensPatch


@dataclass
class ETC(GlobalTokensPatch):
    """The first token of every segment is global: it sees everything before it and is seen by everything after it;
    all tokens see a window of recent ones.

    Ainslie et al. 2020, "ETC: Encoding Long and Structured Inputs in Transformers". There the global tokens are an
    auxiliary input, one for each segment, tied to it by relative position labels and trained so. A pretrained decoder
    has neither; a segment's first token stands in for its global token, and attention is causal. So the work grows
    with the square of the input over `segment_tokens`, and everything is stored.

    Attributes (options):
        segment_tokens: tokens of a segment, counted from the start of the input.
    """

    name = "etc"
    source = "Ainslie et al. 2020 (ETC)"
    summary = "a window, and the first token of every segment sees everything and is seen by all after it"
    stores = "everything"

    segment_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, segment_tokens=self.segment_tokens)

    def marks(self, scene: Scene) -> Tensor:
        B, _, Q, _ = scene.queries.shape
        places = torch.arange(scene.first, scene.first + Q, device=scene.queries.device)
        return (places % self.segment_tokens == 0).expand(B, -1)
