"""500xCompressor: ICAE whose memory is the slots' keys and values."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.icae import encode_alone, slots_and_cues
from longfit.compressors.soft.slot_table import SlotTableCompressor
from longfit.compressors.soft.store import stored


@dataclass
class Compressor500x(SlotTableCompressor):
    """`[segment ; slots]` through the model with the encoder's LoRA, each segment on its own; the slots' keys and
    values of every layer are the memory of the untouched model, which reads on after them.

    Deviations: the keys move to positions 0, 1, ... of the memory and the reader goes on behind it. In the authors'
    code they stay at n and after while the reader starts at k, so the memory lies in its future, at distances that
    depend on the length of the text. ceil(n / ratio) slots (paper: 1, 4 or 16 for up to 500 tokens); slots start with
    the spread of the embeddings (theirs: standard normal); learned cues "ae" and "continuation" where the paper has
    the beginning-of-text token; no padding is encoded. Raw sink tokens stand first in the memory.
    """

    name = "compressor_500x"
    source = "Li et al. 2025, arXiv:2408.03094"
    summary = "ICAE with the slots' keys and values as memory, at packed positions"
    memory = "kv"
    packed = True
    trains = "encoder LoRA, memory slots, cues"
    left_out = "the beginning-of-text token as trigger; an end token after the text that is spelt again"
    adapters_used = (ENCODER,)
    losses: ClassVar[dict[str, float]] = {"ae": 0.5, "continuation": 0.5}

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        return slots_and_cues(self.most_slots(), backbone.vocabulary())

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        places, given, _ = encode_alone(self, ids, past, ratio)
        seen = (past.tokens_in if past else 0) + ids.shape[1]
        return stored(self.backbone, given.entries, places.kept, places.sources, past, seen, packed=self.packed)
