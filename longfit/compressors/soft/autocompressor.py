"""AutoCompressor: summary vectors of each segment, read as input embeddings by everything that follows."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, LearnedCompressor
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import random_spans, segment_spans
from longfit.compressors.soft.modules import RmsMatch, SlotEmbedding, rms
from longfit.compressors.soft.places import appended
from longfit.compressors.soft.store import soft_stored
from longfit.errors import InputError


@dataclass
class AutoCompressor(LearnedCompressor):
    """`[memory ; segment ; summary slots]`, causal, at positions 0, 1, 2, ...; the last hidden states (after the final
    norm) at the slots join the memory, which the next segment and the reader see as input embeddings.

    Options:
        accumulate: the memory grows by each segment's summary; False replaces it (the recurrent memory transformer).
        detach_every: segments after which the memory is cut from its graph (truncated back-propagation; the paper: 2);
            0 for never.

    In training (`rng` set) segments get random boundaries, the paper's: with `segment_tokens` 2,048, a text of 6,144
    becomes 4 segments of 1,024 to 2,048 tokens.

    Deviations: ceil(n / ratio) summary vectors for a segment of n tokens, where the paper has 50 for each. Hidden
    states are far larger than embeddings, so they are brought to their size by a trained gain for each channel; the
    paper feeds them back as they are and lets training do it. LoRA at every linear layer, alpha = 2 r (paper: q, k, v,
    o with alpha = r for Llama, all weights for OPT). The slots start as the end-of-text embedding plus 2 % noise. Raw
    sink tokens stand first in the memory.
    """

    name = "autocompressor"
    source = "Chevalier et al. 2023, arXiv:2305.14788"
    summary = "summary vectors from the last hidden states of added slots, read as input embeddings"
    memory = "soft"
    trains = "summary slots, their gain, LoRA that acts while writing and reading"
    left_out = "OPT's zero positions for slots; no loss on the first segment"
    recurrent = True
    adapters_used = (ENCODER,)
    shared_adapter = True
    losses: ClassVar[dict[str, float]] = {"next_segment": 1.0, "lm": 1.0}

    accumulate: bool = True
    detach_every: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detach_every < 0:
            raise InputError(f"{self.name}: detach_every has to be at least 0, got {self.detach_every}")

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        like, end = backbone.vocabulary(), backbone.end_embedding()
        size = float(rms(like).mean())
        return nn.ModuleDict(
            {
                "slots": SlotEmbedding(self.most_slots(), like, "mean" if end is None else end),
                "gain": RmsMatch(backbone.width, size),
            }
        )

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        if not isinstance(self.rng, random.Random):
            return segment_spans(tokens, self.segment_tokens)
        segments = max(1, -(-4 * tokens // (3 * self.segment_tokens)))
        return random_spans(tokens, segments, self.segment_tokens, self.rng)

    def compress(self, ids: Tensor, past: Encoded | None = None, ratio: int | None = None) -> Encoded:
        encoded = past
        for done, (start, stop) in enumerate(self.spans(ids.shape[1])):
            if encoded is not None and self.detach_every and done and done % self.detach_every == 0:
                encoded = encoded.detach()
            encoded = self.encode(ids[:, start:stop], encoded, ratio or self.ratio)
            self.observer(stop)
        if encoded is None:
            raise InputError(f"{self.name}: the context is empty")
        return encoded

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        sinks, seen = self.cut_sinks(ids, past), past.tokens_in if past else 0
        places, tokens = appended(ids.shape[1], sinks, ratio, seen), self.backbone.embed(ids)
        slots = self.slot_rows(places.slots.shape[0], tokens)
        before = tokens[:, :0] if past is None or past.soft is None else past.soft.to(tokens.dtype)
        embeds = torch.cat([before, tokens, slots], 1)
        with self.encoding():
            given = self.backbone.run(embeds, torch.arange(embeds.shape[1], device=ids.device))
        summary = self.modules["gain"](given.hidden[:, embeds.shape[1] - slots.shape[1] :]).to(tokens.dtype)
        sources, new = places.sources, torch.cat([tokens[:, :sinks], summary], 1)
        if past is not None and not self.accumulate:
            return self._replaced(past, summary, seen + ids.shape[1])
        return soft_stored(new, sources, past, seen + ids.shape[1])

    def _replaced(self, past: Encoded, summary: Tensor, seen: int) -> Encoded:
        """The sinks and the newest summary, which stands for all of the context."""
        assert past.soft is not None
        sinks = min(self.sink_tokens, int((past.sources[:, 1] - past.sources[:, 0] == 1).sum()), past.tokens_in)
        whole = torch.tensor([[sinks, seen]]).expand(summary.shape[1], -1)
        soft = torch.cat([past.soft[:, :sinks], summary], 1)
        return soft_stored(soft, torch.cat([past.sources[:sinks], whole]), None, seen)

    def slots_for(self, tokens: int, ratio: int | None = None) -> int:
        if self.accumulate or tokens <= self.segment_tokens:
            return super().slots_for(tokens, ratio)
        start, stop = segment_spans(tokens, self.segment_tokens)[-1]
        return min(self.sink_tokens, self.segment_tokens) + -(-(stop - start) // (ratio or self.ratio))
