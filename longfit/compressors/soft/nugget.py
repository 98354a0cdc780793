"""Nugget: a trained scorer picks the tokens whose keys and values stay."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, READER, LearnedCompressor
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.modules import rms
from longfit.compressors.soft.store import stored
from longfit.errors import InputError


@dataclass
class Nugget(LearnedCompressor):
    """The hidden states after the model's first layers, without any adapter, are scored by a small network; the
    ceil(n / ratio) best tokens of a segment keep their keys and values, at their own positions. Selection has no
    gradient, so the score of a kept token is added to the logits of all attention to it as `s - s.detach()`: nothing
    in value, the scorer's gradient in training.

    Options:
        scorer_layer: layers under the scorer; one less than the model has, where it has fewer.
        force_last: the last token of a segment is always kept.

    Deviations: the scorer reads each segment on its own, and its hidden states at unit size. Every attention to a
    nugget carries the score: the reader's and that of later segments. Sliding layers of hybrid models keep their
    window and get no score. At ratio 1 nothing is dropped and, untrained, the model computes what it always does.
    """

    name = "nugget"
    source = "Qin and Van Durme 2023, arXiv:2310.01732; decoder-only: Dodo (Qin et al. 2024, arXiv:2310.02409)"
    summary = "keys and values of the n / r tokens that a trained scorer picks"
    memory = "kv"
    trains = "scorer, encoder LoRA, reader LoRA"
    left_out = (
        "encoder-decoder models; value_ffn; translation as an objective; auto-encoding of the first token (there is no "
        "cue)"
    )
    recurrent = True
    adapters_used = (ENCODER, READER)
    losses: ClassVar[dict[str, float]] = {"ae": 0.5, "lm": 0.5}

    scorer_layer: int = 3
    force_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer_layer < 1:
            raise InputError(f"{self.name}: scorer_layer has to be at least 1, got {self.scorer_layer}")

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        E = backbone.width
        return nn.ModuleDict({"scorer": nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 1))})

    def scores(self, ids: Tensor) -> Tensor:
        """[B, n] in fp32, higher is kept."""
        stop = min(self.scorer_layer, len(self.backbone.layers) - 1)
        with torch.no_grad(), self.lora.using(None):
            positions = torch.arange(ids.shape[1], device=ids.device)
            hidden = self.backbone.run(self.backbone.embed(ids), positions, stop_at=stop).hidden
        return self.modules["scorer"](hidden.float() / rms(hidden)).squeeze(-1)

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        sinks, seen, n = self.cut_sinks(ids, past), past.tokens_in if past else 0, ids.shape[1]
        scores = self.scores(ids)
        kept = best(scores.detach(), -(-(n - sinks) // ratio), sinks, self.force_last)
        positions = torch.arange(seen, seen + n, device=ids.device)
        with self.encoding():
            given = self.backbone.run(
                self.backbone.embed(ids),
                positions,
                past=past.layers if past else None,
                past_bias=self.slot_bias(past) if past else None,
            )
        firsts = kept.cpu() + seen
        sources = torch.stack([firsts, firsts + 1], -1)
        encoded = stored(self.backbone, given.entries, kept, sources, past, seen + n)
        chosen = scores.gather(1, kept)
        before = past.scores if past is not None else None
        return replace(encoded, scores=chosen if before is None else torch.cat([before, chosen], 1))

    def slot_bias(self, encoded: Encoded) -> Tensor | None:
        scores = encoded.scores
        return scores - scores.detach() if scores is not None and scores.requires_grad else None


def best(scores: Tensor, slots: int, sinks: int, force_last: bool) -> Tensor:
    """Indices [B, sinks + slots], rising, of the sinks and the `slots` best of the rest by `scores` [B, n]."""
    wanted = scores.clone()
    if force_last and slots:
        wanted[:, -1] = torch.inf
    chosen = wanted[:, sinks:].topk(slots, dim=1).indices + sinks
    first = torch.arange(sinks, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([first, chosen.sort(1).values], 1)
