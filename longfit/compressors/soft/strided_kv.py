"""Strided fine-KV: of each group of tokens the last one's keys and values stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longfit.compressors.soft.base import ENCODER, LearnedCompressor
from longfit.compressors.soft.encoded import Encoded, spans_of
from longfit.compressors.soft.layout import stride_sizes
from longfit.compressors.soft.store import stored


@dataclass
class StridedKV(LearnedCompressor):
    """The segment is read causally in sight of the memory so far, with the encoder's LoRA, and the last of every
    `ratio` tokens keeps its keys and values, at its own position. No new token, no new module; the reader is the
    untouched base model. Rank 0 (or no adapter) is the training-free form.

    Closest published relative: the fine-grained KV form of "A Silver Bullet or a Compromise" (Deng et al. 2025), which
    interleaves gist tokens where this takes the text's own; Nugget without a scorer.
    """

    name = "strided_kv"
    source = "after Deng et al. 2025 (fine-grained KV), without added tokens"
    summary = "keys and values of the last of every r tokens, from an encoder LoRA; works untrained"
    memory = "kv"
    trains = "encoder LoRA"
    left_out = "the study's interleaved gist tokens and training of all weights (see gist)"
    needs_training = False
    recurrent = True
    adapters_used = (ENCODER,)
    losses: ClassVar[dict[str, float]] = {"kl": 1.0, "ce": 1.0}

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        sinks, first = self.cut_sinks(ids, past), 0 if past is None else past.tokens_in
        sizes = stride_sizes(ids.shape[1] - sinks, ratio)
        spans = torch.cat([spans_of(torch.ones(sinks, dtype=torch.long), first), spans_of(sizes, first + sinks)])
        kept = (spans[:, 1] - 1 - first).to(ids.device)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        with self.encoding():
            given = self.backbone.run(self.backbone.embed(ids), positions, past=past.layers if past else None)
        return stored(self.backbone, given.entries, kept, spans, past, first + ids.shape[1])
