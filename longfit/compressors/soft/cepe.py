"""CEPE: chunks read both ways by a small encoder; every layer of the frozen reader attends to their states."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.adapters import Adapters
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.cross import Change, CrossAttention, Read, attention_of, injected
from longfit.compressors.soft.encoded import Encoded, spans_of
from longfit.compressors.soft.layout import pool, stride_sizes
from longfit.compressors.soft.modules import rms
from longfit.compressors.soft.states import StateCompressor
from longfit.errors import InputError


@dataclass
class CEPE(StateCompressor):
    """Chunks of `segment_tokens` are read alone and both ways; their states, one for each token, are stored once for
    all layers. Every layer of the reader attends to them between self-attention and feed-forward, through a
    cross-attention of its own whose output starts at zero. The reader is frozen.

    Source: Yen, Gao and Chen 2024, "Long-Context Language Modeling with Parallel Context Encoding", and its code:
    chunks of 256; no rotary positions and an RMS norm of its own in cross-attention; weights copied from
    self-attention, output zeroed; trained first on the same 256 tokens for encoder and reader, then to predict what
    follows; the distilled form (CEPED) adds twice the KL divergence.

    Deviations: the encoder is not a new model of 435 M parameters trained by masked-token prediction but the reader's
    own first layers with LoRA and a full mask, so the states are as wide as the reader's (the paper's are a quarter),
    and divided by their root mean square as the paper's end in a norm; keys and values of the memory are projected once
    for as long as it is read, not at each token; `ratio` above 1 averages states (not in the paper). Where feed-forward
    and attention run side by side (GPT-NeoX), the memory joins after both.

    Options besides the common ones:
        encoder_layers: how many of the model's first layers read the chunks.
    """

    name = "cepe"
    source = "Yen, Gao and Chen 2024, CEPE"
    summary = "a bidirectional encoder over chunks of 256, one state a token, read by cross-attention in every layer"
    trains = "encoder LoRA, cross-attention in every layer"
    left_out = (
        "the encoder trained by masked-token prediction; masking of the encoder's input; questions in the encoder; a "
        "divergence that leaves out what is beyond the top k"
    )
    losses: ClassVar[dict[str, float]] = {"ce": 1.0, "kl": 2.0}

    ratio: int = 1
    segment_tokens: int = 256
    encoder_layers: int = 6

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        if not 1 <= self.encoder_layers < len(backbone.layers):
            raise InputError(
                f"{self.name}: encoder_layers={self.encoder_layers} of a model with {len(backbone.layers)} layers"
            )
        crosses = nn.ModuleList(cross_like(backbone, index) for index in range(len(backbone.layers)))
        return nn.ModuleDict({"cross": crosses})

    def make_adapters(self, model: Any, ranks: dict[str, int]) -> Adapters:
        return Adapters(model, ranks, layers=dict.fromkeys(ranks, self.encoder_layers))

    def states(self, ids: Tensor, past: Encoded | None, ratio: int) -> tuple[Tensor, Tensor]:
        n = ids.shape[1]
        both_ways = torch.ones(n, n, dtype=torch.bool, device=ids.device)
        with self.encoding():
            embeds = self.backbone.embed(ids)
            positions = torch.arange(n, device=ids.device)
            given = self.backbone.run(embeds, positions, allowed=both_ways, stop_at=self.encoder_layers)
        sizes = stride_sizes(n, ratio)
        hidden = given.hidden.float()
        return pool(hidden / rms(hidden), sizes).to(given.hidden.dtype), spans_of(sizes)

    def attached(self, states: Tensor) -> AbstractContextManager[None]:
        crosses: Any = self.modules["cross"]
        added: dict[int, Change] = {index: Read(cross, states) for index, cross in enumerate(crosses)}
        return injected(self.backbone.layers, added, "after_attention")


def cross_like(backbone: Backbone, layer: int) -> CrossAttention:
    """Cross-attention with the shape and, where they fit, the weights of a layer's self-attention; output zero."""
    config = backbone.config
    H = config.num_attention_heads
    G = getattr(config, "num_key_value_heads", None) or H
    D = getattr(config, "head_dim", None) or backbone.width // H
    cross = CrossAttention(backbone.width, backbone.width, H, G, D)
    attention = attention_of(backbone.layers[layer])
    for ours, theirs in ((cross.query, "q_proj"), (cross.key, "k_proj"), (cross.value, "v_proj")):
        weight = getattr(getattr(attention, theirs, None), "weight", None)
        if weight is not None and weight.shape == ours.weight.shape:
            ours.weight.data = weight.detach().float().clone()
    nn.init.zeros_(cross.out.weight)
    return cross
