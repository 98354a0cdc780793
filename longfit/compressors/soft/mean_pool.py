"""Mean pooling: the same LM reads both ways, and the mean of each group's last hidden states is a slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.adapters import Adapters, SplitAdapters
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, READER
from longfit.compressors.soft.embeddings import embedding_size
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import pool, segment_spans, stride_sizes
from longfit.compressors.soft.modules import Projector
from longfit.compressors.soft.slots import SlotCompressor


@dataclass
class MeanPool(SlotCompressor):
    """The encoder is the reader's own LM with a full attention mask and a LoRA adapter; slot i is a linear map of the
    mean of the last hidden states of tokens r i to r (i + 1) - 1. A second adapter acts while reading.

    Source: Feldman and Artzi 2025, "Simple Context Compression": LoRA of rank 16, contexts of up to 1,024 tokens,
    trained by nothing but the KL divergence to the same model with the whole context, for several ratios at each step.

    Deviations: the linear map is matched in size and starts at zero on top of the mean of the group's own token
    embeddings, so that an untrained slot is an average token instead of a vector twenty times too large; sliding layers
    keep their window, both ways; the teacher is the model as it is, not first tuned on the task. The training loop
    draws one of the recipe's ratios for each step; `compress_by_ratio` makes the memories of several from one pass of
    the encoder, for a loop that sums their losses, and ours does not call it.

    Options besides the common ones:
        reader_adapter: whether the reader has an adapter; without it the base model reads (the paper measures a cost of
            3.6 F1).
    """

    name = "mean_pool"
    source = "Feldman and Artzi 2025, Simple Context Compression"
    summary = "mean of every r last hidden states of the same LM, read both ways, through one linear map"
    trains = "encoder LoRA, reader LoRA, one linear map"
    left_out = "the teacher's own tuning on the training mixture; several ratios at each step (one is drawn)"
    adapters_used = (ENCODER, READER)
    losses: ClassVar[dict[str, float]] = {"kl": 1.0}

    reader_adapter: bool = True

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        width = backbone.width
        return nn.ModuleDict({"projector": Projector(width, width, embedding_size(backbone), zero=True)})

    def make_adapters(self, model: Any, ranks: dict[str, int]) -> Adapters | SplitAdapters:
        wanted = {name: rank for name, rank in ranks.items() if name != READER or self.reader_adapter}
        return super().make_adapters(model, wanted)

    def slots(self, ids: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        return self.slots_by_ratio(ids, (ratio,))[ratio]

    def compress_by_ratio(self, ids: Tensor, ratios: Sequence[int]) -> dict[int, Encoded]:
        """`compress` of a whole context [B, n] for several ratios, each segment read once."""
        encoded: dict[int, Encoded] = {}
        for ratio in ratios:
            self.check_ratio(ratio)
        for start, stop in segment_spans(ids.shape[1], self.segment_tokens):
            segment = ids[:, start:stop]
            rest = segment[:, self.sink_tokens if start == 0 else 0 :]
            made = self.slots_by_ratio(rest, ratios) if rest.shape[1] else {}
            encoded = {ratio: self.joined(segment, encoded.get(ratio), made.get(ratio)) for ratio in ratios}
        return encoded

    def slots_by_ratio(self, ids: Tensor, ratios: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Slots [B, m, E] and group sizes [m] for each ratio, from one pass over ids [B, n]."""
        embeds, n = self.backbone.embed(ids), ids.shape[1]
        both_ways = torch.ones(n, n, dtype=torch.bool, device=ids.device)
        with self.encoding():
            hidden = self.backbone.run(embeds, torch.arange(n, device=ids.device), allowed=both_ways).hidden
        made = {}
        for ratio in ratios:
            sizes = stride_sizes(n, ratio)
            made[ratio] = self.modules["projector"](pool(hidden, sizes), pool(embeds, sizes)), sizes
        return made
