"""ICAE: an encoder with LoRA fills memory slots; the untouched model reads them as input embeddings."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone, Pass
from longfit.compressors.soft.base import ENCODER
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.modules import RmsMatch, SlotEmbedding, rms
from longfit.compressors.soft.places import Places, appended
from longfit.compressors.soft.slot_table import SlotTableCompressor
from longfit.compressors.soft.store import soft_stored


@dataclass
class ICAE(SlotTableCompressor):
    """`[segment ; memory slots]` through the model with the encoder's LoRA, each segment on its own; the last hidden
    states at the slots are the memory. The reader is the base model with no adapter. A cue says what it is to do:
    "ae" to spell the context again, "continuation" to go on after it.

    Deviations: ceil(n / ratio) slots for a segment of n tokens, where the paper has 128 for up to 512. Hidden states
    are brought to the size of embeddings by a trained gain for each channel (the paper feeds them as they are). LoRA
    at every linear layer (paper: q and v). Slots and cues start with the spread of the vocabulary's embeddings. Raw
    sink tokens stand first in the memory.
    """

    name = "icae"
    source = "Ge et al. 2024, arXiv:2307.06945"
    summary = "memory slots filled by an encoder LoRA, read as input embeddings by the frozen model"
    memory = "soft"
    trains = "encoder LoRA, memory slots, their gain, cues"
    left_out = (
        "the fine-tuning stage and its cue [FT]; an end token after the text that is spelt again; the 8 first tokens "
        "of a continuation that bear no loss are the recipe's to set (loss_options: skip_first)"
    )
    adapters_used = (ENCODER,)
    losses: ClassVar[dict[str, float]] = {"ae": 0.5, "continuation": 0.5}

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        like = backbone.vocabulary()
        modules = slots_and_cues(self.most_slots(), like)
        modules["gain"] = RmsMatch(backbone.width, float(rms(like).mean()))
        return modules

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        places, given, tokens = encode_alone(self, ids, past, ratio)
        summary = self.modules["gain"](given.hidden[:, ids.shape[1] :]).to(tokens.dtype)
        soft = torch.cat([tokens[:, : self.cut_sinks(ids, past)], summary], 1)
        return soft_stored(soft, places.sources, past, (past.tokens_in if past else 0) + ids.shape[1])


def slots_and_cues(slots: int, like: Tensor) -> nn.ModuleDict:
    """Slot embeddings and the cues "ae" and "continuation", all with the spread of the embeddings `like` [N, E]."""
    names = SlotEmbedding(2, like, "normal").weight.detach()
    named = zip(("ae", "continuation"), names, strict=True)
    cues = nn.ModuleDict({name: SlotEmbedding(1, like, start) for name, start in named})
    return nn.ModuleDict({"slots": SlotEmbedding(slots, like, "normal"), "cues": cues})


def encode_alone(
    method: SlotTableCompressor, ids: Tensor, past: Encoded | None, ratio: int
) -> tuple[Places, Pass, Tensor]:
    """One segment [B, n] with slots after it, in sight of nothing before: where they stand, the pass at positions 0,
    1, ..., and the embeddings [B, n, E] of the segment."""
    first, tokens = past.tokens_in if past else 0, method.backbone.embed(ids)
    places = appended(ids.shape[1], method.cut_sinks(ids, past), ratio, first)
    embeds = places.mix(tokens, method.slot_rows(places.slots.shape[0], tokens))
    with method.encoding():
        return places, method.backbone.run(embeds, torch.arange(places.total, device=ids.device)), tokens
