"""AutoCompressor: summary vectors of each segment, read as input embeddings by everything that follows."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER
from longfit.compressors.soft.embeddings import token_nearness
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import random_spans, segment_spans, stride_sizes
from longfit.compressors.soft.modules import RmsMatch, SlotEmbedding, rms
from longfit.compressors.soft.places import appended
from longfit.compressors.soft.slot_table import SlotTableCompressor
from longfit.compressors.soft.store import soft_stored
from longfit.errors import InputError


@dataclass
class AutoCompressor(SlotTableCompressor):
    """`[memory ; segment ; summary slots]`, causal, at positions 0, 1, 2, ...; the last hidden states (after the final
    norm) at the slots join the memory, which the next segment and the reader see as input embeddings.

    Options:
        accumulate: the memory grows by each segment's summary; False replaces it (the recurrent memory transformer).
        detach_every: segments after which the memory is cut from its graph (truncated back-propagation; the paper: 2);
            0 for never.
        slot_positions: rotary positions of the slots: "after" the segment, one after the other (the paper), or
            "spread" over it, slot i at the last of its ratio tokens; what it has to take up is then close by (as in
            Zhao et al. 2024, "Position IDs Matter").

    A loss of its own, "slot_ae": the tokens r i to r (i + 1) - 1 of its segment have to be the nearest embeddings to
    slot i, see `token_nearness`. It gives every slot something to say before anything reads it; ours, and for a memory
    that grows only.

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
    left_out = (
        "OPT's zero positions for slots; the loss on the first segment; a segment's first token predicted by the last "
        "of the one before (here by the last slot); joining summaries of passages that were read alone"
    )
    recurrent = True
    adapters_used = (ENCODER,)
    shared_adapter = True
    losses: ClassVar[dict[str, float]] = {"next_segment": 1.0, "lm": 1.0}

    accumulate: bool = True
    detach_every: int = 2
    slot_positions: str = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slot_positions not in ("after", "spread"):
            raise InputError(f'{self.name}: slot_positions has to be "after" or "spread", got {self.slot_positions!r}')
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
        encoded, ratio = past, ratio or self.ratio
        self.check_ratio(ratio)
        for done, (start, stop) in enumerate(self.spans(ids.shape[1])):
            if encoded is not None and self.detach_every and done and done % self.detach_every == 0:
                encoded = encoded.detach()
            encoded = self.encode(ids[:, start:stop], encoded, ratio)
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
        positions = torch.arange(embeds.shape[1])
        if self.slot_positions == "spread" and len(places.slots):
            ends = stride_sizes(ids.shape[1] - sinks, ratio).cumsum(0) + sinks - 1
            positions[-len(ends) :] = before.shape[1] + ends
        with self.encoding():
            given = self.backbone.run(embeds, positions.to(ids.device))
        summary = self.modules["gain"](given.hidden[:, embeds.shape[1] - slots.shape[1] :]).to(tokens.dtype)
        sources, new = places.sources, torch.cat([tokens[:, :sinks], summary], 1)
        if past is not None and not self.accumulate:
            return self._replaced(past, summary, seen + ids.shape[1])
        return soft_stored(new, sources, past, seen + ids.shape[1])

    def auxiliary(self, encoded: Encoded, ids: Tensor, ratio: int) -> dict[str, Tensor]:
        if encoded.soft is None or not self.accumulate:  # what replaces the memory has no tokens a slot
            return {}
        table, losses = self.backbone.model.get_input_embeddings().weight, []
        # Slots of one segment share their source; sinks have a token each.
        sinks = min(self.sink_tokens, ids.shape[1])
        spans, counts = encoded.sources[sinks:].unique_consecutive(dim=0, return_counts=True)
        slots = encoded.soft[:, sinks:].split(counts.tolist(), 1)
        for (start, stop), given in zip(spans.tolist(), slots, strict=True):
            losses.append(token_nearness(given, ids[:, start:stop], stride_sizes(stop - start, ratio), table))
        return {"slot_ae": torch.stack(losses).mean()} if losses else {}

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
