"""LCIRC: a recurrent perceiver over raw token embeddings, read by a frozen model through gated cross-attention."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.cross import Change, GatedCross, Read, injected
from longfit.compressors.soft.embeddings import embedding_size
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import segment_spans
from longfit.compressors.soft.perceiver import Perceiver
from longfit.compressors.soft.states import StateCompressor
from longfit.errors import InputError


@dataclass
class LCIRC(StateCompressor):
    """K = segment_tokens / ratio latents (64 by default) read each segment's token embeddings; the latents of one
    segment are the queries for the next, and the latents of all segments together are the memory. Before every third
    layer and the last one, gated cross-attention reads them. The model itself never reads the context, and stays
    frozen.

    Source: An et al. 2025, "LCIRC", and its code: 4 perceiver layers, 64 latents, blocks before layers 0, 3, ... and
    the last, tanh gates that start at 0, segments of random length up to 4,096 tokens, cross-entropy of the 4,096
    tokens that follow each of them, Adam with a learning rate of 5e-5; no gradient from one segment to the one before.

    Deviations: the position table fits the longest segment (the original's limit is the model's width) and starts at
    the size of the embeddings; modules are fp32 (bf16 in the original); all latents are kept (the original trains with
    the last 50 segments'). In training, segments have one length, the gradient runs through all of them, and the loss
    is that of what follows the whole context (a recipe may name `next_segment` for one after every segment). A short
    last segment costs as many latents as a whole one, as in the original, and `slots_for` says so.

    Options besides the common ones (`rank` has no use: nothing of the model is adapted):
        layers: of the perceiver.
        every: a block before every so many layers.
        inner: width of the feed-forwards; the model's own if 0.
    """

    name = "lcirc"
    source = "An et al. 2025, LCIRC"
    summary = "64 recurrent latents a segment from raw embeddings, read through gated cross-attention"
    trains = "perceiver, gated cross-attention"
    left_out = (
        "segments of random length; the cut of the gradient from one segment to the one before; the loss after every "
        "segment (a recipe may name next_segment); forgetting of all but the last 50 segments"
    )
    recurrent = True
    adapters_used = ()
    losses: ClassVar[dict[str, float]] = {"ce": 1.0}

    ratio: int = 16
    layers: int = 4
    every: int = 3
    inner: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("layers", 1), ("every", 1), ("inner", 0)):
            if getattr(self, option) < least:
                raise InputError(f"{self.name}: {option} has to be at least {least}, got {getattr(self, option)}")

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        E, L, sizes = backbone.width, len(backbone.layers), self.sizes(backbone)
        self.before = sorted({*range(0, L, self.every), L - 1})
        perceiver = Perceiver(
            E, *sizes, self.layers, self.latents_for(self.ratio), self.segment_tokens, embedding_size(backbone)
        )
        blocks = nn.ModuleList(GatedCross(E, *sizes) for _ in self.before)
        return nn.ModuleDict({"perceiver": perceiver, "blocks": blocks})

    def sizes(self, backbone: Backbone) -> tuple[int, int, int]:
        """Heads, head size and inner width of every block."""
        H = backbone.config.num_attention_heads
        return H, backbone.width // H, self.inner or backbone.config.intermediate_size

    def latents_for(self, ratio: int) -> int:
        """K: latents of each segment."""
        return -(-self.segment_tokens // ratio)

    def slots_for(self, tokens: int, ratio: int | None = None) -> int:
        return self.latents_for(ratio or self.ratio) * len(segment_spans(tokens, self.segment_tokens))

    def states(self, ids: Tensor, past: Encoded | None, ratio: int) -> tuple[Tensor, Tensor]:
        perceiver: Any = self.modules["perceiver"]
        K, n = self.latents_for(ratio), ids.shape[1]
        if perceiver.latents.shape[0] < K:
            raise InputError(f"{self.name} has {perceiver.latents.shape[0]} latents; ratio {ratio} would need {K}")
        if past is None:
            latents = perceiver.start(ids.shape[0])[:, :K]
        else:
            assert past.states is not None
            latents = past.states[:, -K:].float()
        made = perceiver(self.prepared(latents), self.backbone.embed(ids))
        return made.to(self.backbone.dtype), torch.tensor([[0, n]]).expand(K, -1)

    def prepared(self, latents: Tensor) -> Tensor:
        """Latents [B, K, E] before they read a segment."""
        return latents

    def attached(self, states: Tensor) -> AbstractContextManager[None]:
        blocks: Any = self.modules["blocks"]
        changes: dict[int, Change] = {
            layer: Read(block.attention, states, block) for layer, block in zip(self.before, blocks, strict=True)
        }
        return injected(self.backbone.layers, changes, "before")
