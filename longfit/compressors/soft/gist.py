"""Gist tokens: added tokens whose keys and values stand for the text before them."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import pool
from longfit.compressors.soft.modules import SlotEmbedding
from longfit.compressors.soft.places import Places, after_groups, appended
from longfit.compressors.soft.slot_table import SlotTableCompressor
from longfit.compressors.soft.store import stored
from longfit.compressors.soft.weak_decoder import WeakDecoder, slot_entries
from longfit.errors import InputError


@dataclass
class Gist(SlotTableCompressor):
    """Gist slots run through the model with the text; of a finished segment only their keys and values stay.

    Inside a segment everything is causal: tokens see the raw text and the gists before them. What follows sees the
    sinks and the gists only. That is the gist mask; it is never built, the raw entries are gone. Gists repeat the
    position of the token before them, so text keeps its own positions, and the memory has holes.

    Options:
        form: "fine", one gist after every `ratio` tokens, all of one embedding; or "coarse", ceil(n / ratio) gists,
            each with its own embedding, after a segment of n tokens.
        autoencode: train with the gist study's auto-encoding: a one-layer decoder has to spell the tokens of a gist
            from its keys and values alone. A loss "slot_ae"; fine form only.
        autoencode_slots: gists drawn for that loss in each context.
        slot_start: what a gist's embedding is: "learned", the same for all (the papers), or "mean", that of its tokens'
            mean plus what is learned; fine form only. It has something of each token before anything is trained; ours.

    Deviations: LoRA, in writing and in reading, where both papers train all weights. In Mu et al.'s code gists take
    positions of their own, which moves the text behind them; any number of gists, where they have 1 to 10; the number
    of coarse embeddings is set by `ratio` and `segment_tokens`. Sliding layers of hybrid models see the text of their
    window, as without gists. What the auto-encoder's decoder reads is told in `weak_decoder`; the study does not say.
    """

    name = "gist"
    source = "Mu et al. 2023, arXiv:2304.08467; fine form and auto-encoding: Deng et al. 2025, arXiv:2412.17483"
    summary = "keys and values of added gist tokens, one after every r tokens or k after a segment"
    memory = "kv"
    trains = "gist embeddings, LoRA that acts while writing and reading; the auto-encoder's decoder"
    left_out = (
        "encoder-decoder models; the masked controls (pos_control, neg_control); training of all weights; a ratio "
        "drawn for each text (here for each step)"
    )
    recurrent = True
    adapters_used = (ENCODER,)
    shared_adapter = True
    losses: ClassVar[dict[str, float]] = {"ce": 1.0}

    form: str = "fine"
    autoencode: bool = False
    autoencode_slots: int = 64
    slot_start: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("fine", "coarse"):
            raise InputError(f'{self.name}: form has to be "fine" or "coarse", got {self.form!r}')
        if self.slot_start not in ("learned", "mean"):
            raise InputError(f'{self.name}: slot_start has to be "learned" or "mean", got {self.slot_start!r}')
        for option, chosen in (("autoencode", self.autoencode), ('slot_start="mean"', self.slot_start == "mean")):
            if chosen and self.form != "fine":
                raise InputError(f'{self.name}: {option} needs form="fine", where a gist stands for its own tokens')

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        rows = 1 if self.form == "fine" else self.most_slots()
        like = backbone.vocabulary()
        start = "mean" if self.slot_start == "learned" else torch.zeros_like(like[0])
        modules = nn.ModuleDict({"slots": SlotEmbedding(rows, like, start)})
        if self.autoencode:
            modules["autoencoder"] = WeakDecoder.of(backbone)
        return modules

    def places(self, ids: Tensor, past: Encoded | None, ratio: int) -> Places:
        """Where the gists of a segment stand."""
        lay = after_groups if self.form == "fine" else appended
        return lay(ids.shape[1], self.cut_sinks(ids, past), ratio, past.tokens_in if past else 0)

    def slots(self, places: Places, tokens: Tensor) -> Tensor:
        """Embeddings [B, N, E] of a segment's gists, from its tokens' [B, n, E]."""
        if self.form == "coarse":
            return self.slot_rows(places.slots.shape[0], tokens)
        rows = torch.zeros_like(places.slots)
        learned = cast(SlotEmbedding, self.modules["slots"])(tokens.shape[0], tokens.dtype, rows)
        if self.slot_start == "learned":
            return learned
        spans = places.sources[len(places.sources) - len(rows) :]
        sizes = spans[:, 1] - spans[:, 0]
        return learned + pool(tokens[:, tokens.shape[1] - int(sizes.sum()) :], sizes)

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        places, tokens, device = self.places(ids, past, ratio), self.backbone.embed(ids), ids.device
        seen = past.tokens_in if past else 0
        causal = torch.ones(places.total, places.total, dtype=torch.bool).tril()
        with self.encoding():
            given = self.backbone.run(
                places.mix(tokens, self.slots(places, tokens)),
                places.text_positions(seen).to(device),
                past=past.layers if past else None,
                allowed_sliding=places.text_window(causal).to(device),
            )
        seen += ids.shape[1]
        kept, sources = places.kept, places.sources
        return stored(self.backbone, given.entries, kept, sources, past, seen, window_from=places.tokens)

    def auxiliary(self, encoded: Encoded, ids: Tensor, ratio: int) -> dict[str, Tensor]:
        if not self.autoencode:
            return {}
        slots = torch.arange(min(self.sink_tokens, ids.shape[1]), encoded.slots)
        drawn = slots[torch.randperm(len(slots))[: self.autoencode_slots]].sort().values
        if not len(drawn):
            return {}
        entries = slot_entries(self.backbone, encoded, drawn)
        return {
            "slot_ae": cast(WeakDecoder, self.modules["autoencoder"]).loss(
                self.backbone, entries, ids, encoded.sources[drawn]
            )
        }
