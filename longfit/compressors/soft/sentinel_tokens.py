"""Sentinel tokens: a span of text is replaced by the token that closes it; or only summed up by it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, LearnedCompressor
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import allowed, segment_spans
from longfit.compressors.soft.modules import SlotEmbedding
from longfit.compressors.soft.places import Places, after_groups, around_groups
from longfit.compressors.soft.store import stored


@dataclass
class SentinelTokens(LearnedCompressor):
    """Every `ratio` tokens are a span `<CL> ... <CR>`. <CL> sees itself only, <CR> its span and its <CL>, nothing
    before; tokens see their own span, the <CR> of earlier spans and the sinks. Only the keys and values of <CR> and of
    the sinks stay. Sentinels repeat the position of the token before them, so text keeps its own positions.

    Options:
        keep_raw: "Taking a Deep Breath": one sentinel <SR> after every `ratio` tokens sees its span only; later tokens
            see all text and all sentinels. Nothing is dropped: the memory is larger than the text (`slots_for`), and
            what may be gained is better reading, not room.

    Deviations: every token after the sinks is in a span, and spans are `ratio` tokens long (paper: words, 2 to 25, at
    random places that cover a part of the text). A <CL> at the start of the text has position 0. LoRA at every linear
    layer. For "Taking a Deep Breath" no code is public; positions are those of the other form. Sliding layers of
    hybrid models see the text of their window, as without sentinels.
    """

    name = "sentinel_tokens"
    source = "Ren et al. 2023, arXiv:2310.08152; keep_raw: Luo et al. 2024, arXiv:2406.10985"
    summary = "keys and values of the sentinel that closes a span of r tokens; keep_raw keeps the text beside it"
    memory = "kv"
    trains = "sentinel embeddings, LoRA that acts while writing and reading"
    left_out = (
        "random spans of 2 to 25 words; text outside any span; the loss on the text between sentinels (here on what "
        "follows the context)"
    )
    recurrent = True
    adapters_used = (ENCODER,)
    shared_adapter = True
    losses: ClassVar[dict[str, float]] = {"lm": 1.0}

    keep_raw: bool = False

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        return nn.ModuleDict({"slots": SlotEmbedding(1 if self.keep_raw else 2, backbone.vocabulary())})

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        sinks, seen, device = self.cut_sinks(ids, past), past.tokens_in if past else 0, ids.device
        n, tokens = ids.shape[1], self.backbone.embed(ids)
        lay = after_groups if self.keep_raw else around_groups
        places = lay(n, sinks, ratio, seen)
        seen_by = visible(places, sinks, self.keep_raw)
        N = places.slots.shape[0]
        rows = torch.zeros(N, dtype=torch.long) if self.keep_raw else torch.arange(N) // max(1, N // 2)
        with self.encoding():
            given = self.backbone.run(
                places.mix(tokens, self.modules["slots"](tokens.shape[0], tokens.dtype, rows)),
                places.text_positions(seen).to(device),
                past=past.layers if past else None,
                allowed=seen_by.to(device),
                sees_past=places.is_text.to(device),
                allowed_sliding=places.text_window(seen_by).to(device),
            )
        kept, sources = (places.kept, places.sources) if not self.keep_raw else everything(places, sinks, seen)
        return stored(self.backbone, given.entries, kept, sources, past, seen + n, window_from=places.tokens)

    def slots_for(self, tokens: int, ratio: int | None = None) -> int:
        slots = super().slots_for(tokens, ratio)
        if not self.keep_raw or not tokens:
            return slots
        return slots + tokens - min(self.sink_tokens, segment_spans(tokens, self.segment_tokens)[0][1])


def visible(places: Places, sinks: int, keep_raw: bool) -> Tensor:
    """The sentinel mask of one segment: bool [T + N, T + N], rows are queries."""
    closes = torch.zeros(places.total, dtype=torch.bool)
    closes[places.kept[sinks:]] = True
    opens = torch.zeros(places.total, dtype=torch.bool)
    opens[places.slots] = True
    opens &= ~closes
    return allowed(places.owners(sinks), closes, scope="span", keep_raw=keep_raw, alone=opens)


def everything(places: Places, sinks: int, first: int) -> tuple[Tensor, Tensor]:
    """All T + N entries [T + N] and what they stand for [T + N, 2]: tokens for themselves, slots for their spans."""
    sources = torch.zeros(places.total, 2, dtype=torch.long)
    tokens = torch.arange(places.tokens.shape[0]) + first
    sources[places.tokens] = torch.stack([tokens, tokens + 1], 1)
    sources[places.slots] = places.sources[sinks:]
    return torch.arange(places.total), sources
