"""Activation Beacon: interleaved slots with projections of their own, whose keys and values are the memory."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import LearnedCompressor
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.modules import SlotEmbedding
from longfit.compressors.soft.places import after_groups
from longfit.compressors.soft.projections import SlotProjections
from longfit.compressors.soft.store import stored


@dataclass
class Beacon(LearnedCompressor):
    """One beacon after every `ratio` tokens of a segment, causal over text and beacons ("full coverage"); beacons have
    query, key and value projections of their own, which start as the model's. After the segment the beacons' keys and
    values join the memory at packed positions 0, 1, ..., and the next segment, or the reader, goes on right behind, so
    positions grow with the memory, not with the context. The base is frozen; it reads without a change.

    Deviations: the authors cache keys before they are rotated; here they are rotated back and on in fp32 angles, which
    is the same up to rounding. A last group shorter than `ratio` gets a beacon too (theirs stays raw). All beacons
    start as the end-of-text embedding plus 2 % noise. In sliding layers of hybrid models the window of text and
    beacons stays, moved to end where the memory ends.
    """

    name = "beacon"
    source = "Zhang et al. 2025, arXiv:2401.03462"
    summary = "keys and values of a beacon after every r tokens, from projections of its own, at packed positions"
    memory = "kv"
    packed = True
    trains = "the beacons' q, k and v projections, their embedding"
    left_out = (
        "segment-wise and step-wise coverage; appended beacons; mixing ratios inside one context; the loss on every "
        "window of the context (here on what follows it; next_segment adds the windows after the first); the stage "
        "that tunes all weights"
    )
    recurrent = True
    adapters_used = ()
    losses: ClassVar[dict[str, float]] = {"lm": 1.0}

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        end = backbone.end_embedding()
        return nn.ModuleDict(
            {
                "slots": SlotEmbedding(1, backbone.vocabulary(), "mean" if end is None else end),
                "projections": SlotProjections(backbone.layers),
            }
        )

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        seen, start = (past.tokens_in, past.next_position) if past else (0, 0)
        places, tokens = after_groups(ids.shape[1], self.cut_sinks(ids, past), ratio, seen), self.backbone.embed(ids)
        slots = cast(SlotEmbedding, self.modules["slots"])(
            tokens.shape[0], tokens.dtype, torch.zeros_like(places.slots)
        )
        positions = torch.arange(start, start + places.total, device=ids.device)
        with (
            self.encoding(),
            cast(SlotProjections, self.modules["projections"]).acting(self.backbone.layers, places.slots),
        ):
            given = self.backbone.run(places.mix(tokens, slots), positions, past=past.layers if past else None)
        return stored(
            self.backbone, given.entries, places.kept, places.sources, past, seen + ids.shape[1], packed=self.packed
        )
