"""Compressor and reader in one module: a batch goes in, its losses come out, so that DDP and FSDP see one forward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compressors.soft import LearnedCompressor
from longfit.errors import InputError
from longfit.training.batches import Batch
from longfit.training.losses import cross_entropy, divergence, importance, log_likelihoods

# Every loss that needs the reader's prediction of the target.
ON_TARGET = ("kl", "ce", "lm")
LOSSES = {
    "kl": "divergence from the model that reads the whole context, over the target",
    "ce": "cross-entropy of the answers (of the whole target in rows that have none)",
    "lm": "cross-entropy of the target",
    "continuation": "the same after the cue `continuation`, where the method has it",
    "ae": "cross-entropy of the context itself, after the cue `ae` where the method has it",
    "next_segment": "cross-entropy of each segment after those before it",
}


def other_models(compressor: LearnedCompressor) -> list[nn.Module]:
    """Models of a bound compressor besides the one that reads, as a text encoder of its own."""
    found: list[nn.Module] = []
    for value in vars(compressor).values():
        model = getattr(value, "model", value)
        known = [compressor.backbone.model, compressor.modules, *found]
        if isinstance(model, nn.Module) and not any(model is other for other in known):
            found.append(model)
    return found


def question_of(batch: Batch) -> Tensor:
    """[B, Q] the tokens right before each row's first answer, as many as the shortest of the rows has (1 where a row
    has no answer): what a query-aware method compresses for."""
    later = batch.answers[:, 1:]
    T = later.shape[1]
    first = torch.where(later.any(1), later.int().argmax(1) + 1, 1)
    Q = int(first.min())
    places = first[:, None] - Q + torch.arange(Q, device=first.device)
    return batch.ids.gather(1, places.clamp(max=T))


@dataclass(frozen=True)
class LossOptions:
    """How the losses are computed.

    Attributes:
        kl_top_k: tokens of the teacher's distribution that are compared; all where None.
        kl_temperature: of `kl`.
        tie_gamma: weigh the tokens of `ce`, `lm` and `continuation` by their importance, clipped here; None: do not.
        skip_first: first tokens after the memory that bear no loss in `continuation` (ICAE leaves 8); a raw window
            counts, and so does a first token that is given.
        detach_segments: `next_segment` cuts the graph through the memory each time so many segments have been written;
            as the method's `detach_every` where 0.
    """

    kl_top_k: int | None = None
    kl_temperature: float = 1.0
    tie_gamma: float | None = None
    skip_first: int = 0
    detach_segments: int = 0


class Student(nn.Module):
    """A bound compressor with its model.

    Args:
        compressor: bound; its `parameters()` are what trains, everything else is frozen here.
        options: of the losses.
    """

    def __init__(self, compressor: LearnedCompressor, options: LossOptions) -> None:
        super().__init__()
        self.model: nn.Module = compressor.backbone.model
        self.others = nn.ModuleList(other_models(compressor))
        self.own = compressor.modules
        self.compressor, self.options = compressor, options
        self.requires_grad_(False)
        for parameters in compressor.parameters().values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def trained(self) -> dict[str, nn.Parameter]:
        """What training moves, by its name in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, batch: Batch, weights: dict[str, float], ratio: int) -> dict[str, Tensor]:
        """Each loss that has a weight, and their weighted sum as "loss".

        Raises:
            InputError: a loss that neither this nor the method has.
        """
        # Where a schedule has put all of them to 0, they are computed all the same, and move nothing.
        wanted = {name for name, weight in weights.items() if weight} or set(weights)
        parts: dict[str, Tensor] = {}
        if "next_segment" in wanted:
            parts["next_segment"] = self._next_segment(batch.context, ratio)
        if wanted - {"next_segment"}:
            with self.compressor.asking(question_of(batch)):
                encoded = self.compressor.compress(batch.context, ratio=ratio)
            if own := wanted - set(LOSSES):
                parts |= self._auxiliary(encoded, batch, ratio, own)
            if "ae" in wanted:
                parts["ae"] = self._autoencoding(encoded, batch.context)
            if wanted & {*ON_TARGET, "continuation"}:
                parts |= self._on_target(encoded, batch, wanted)
        parts["loss"] = torch.stack([weights[name] * parts[name].float() for name in weights if name in wanted]).sum()
        return parts

    def _on_target(self, encoded: Any, batch: Batch, wanted: set[str]) -> dict[str, Tensor]:
        ids, options, parts = batch.ids, self.options, {}
        teacher = self.teacher(batch) if "kl" in wanted or options.tie_gamma is not None else None
        factor = torch.ones_like(batch.weights)
        if options.tie_gamma is not None and teacher is not None:
            factor[:, 1:] = self._importance(teacher, batch, options.tie_gamma)
        if wanted & set(ON_TARGET):
            first = self._first(encoded)
            logits, targets = self.compressor.read(encoded, ids, first=first), ids[:, first:]
            weights, factors = batch.weights[:, first:], factor[:, first:]
            if "kl" in wanted and teacher is not None:
                parts["kl"] = divergence(teacher[:, first:], logits, weights, options.kl_top_k, options.kl_temperature)
            if "ce" in wanted:
                answers = batch.answers[:, first:].float()
                # Rows without answers, as plain text, are predicted as a whole.
                answers = torch.where(answers.any(1, keepdim=True), answers, (weights > 0).float())
                parts["ce"] = cross_entropy(logits, targets, answers * factors)
            if "lm" in wanted:
                parts["lm"] = cross_entropy(logits, targets, weights * factors)
        if "continuation" in wanted:
            cue = "continuation" if "continuation" in self.compressor.cues else None
            first = self._first(encoded, cue)
            logits = self.compressor.read(encoded, ids, first=first, cue=cue)
            later = batch.weights * factor
            later[:, : options.skip_first] = 0
            parts["continuation"] = cross_entropy(logits, ids[:, first:], later[:, first:])
        return parts

    @staticmethod
    def _first(encoded: Any, cue: str | None = None) -> int:
        """The first token of the ids after a memory that can be predicted, and so is trained: 0 where soft slots or a
        cue stand before it. Keys and values, and states, are only looked at, so the reader has to get one token raw."""
        return 0 if cue is not None or (encoded.soft is not None and encoded.soft.shape[1]) else 1

    def _importance(self, teacher: Tensor, batch: Batch, gamma: float) -> Tensor:
        """Factors [B, T - 1] of `ids[:, 1:]`, their mean 1: the first token, for which the model that sees no context
        has nothing to go by, weighs as the mean."""
        targets = batch.ids[:, 1:]
        alone = log_likelihoods(self.base(batch.ids, 1), targets)
        real = (batch.weights[:, 1:] > 0).float()
        return importance(log_likelihoods(teacher[:, 1:], targets), alone, real, gamma)

    def _autoencoding(self, encoded: Any, context: Tensor) -> Tensor:
        cue = "ae" if "ae" in self.compressor.cues else None
        first = self._first(encoded, cue)
        logits = self.compressor.read(encoded, context, first=first, cue=cue)
        targets = context[:, first:]
        return cross_entropy(logits, targets, torch.ones_like(targets, dtype=torch.float))

    def _next_segment(self, context: Tensor, ratio: int) -> Tensor:
        spans = self.compressor.spans(context.shape[1])
        if len(spans) < 2:
            raise InputError(
                f"next_segment needs two segments: context_tokens={context.shape[1]} fits into "
                f"segment_tokens={self.compressor.segment_tokens}"
            )
        encoded, losses, counts = None, [], []
        for number, (start, stop) in enumerate(spans):
            segment = context[:, start:stop]
            if encoded is not None:
                first = self._first(encoded)
                if segment.shape[1] > first:
                    logits = self.compressor.read(encoded, segment, first=first)
                    targets = segment[:, first:]
                    losses.append(cross_entropy(logits, targets, torch.ones_like(targets, dtype=torch.float)))
                    counts.append(targets.shape[1])
            if number < len(spans) - 1:
                # Cut before the next segment is written, as `compress` does, not before it is read: else no gradient
                # would reach the slots that were written last.
                every = self.options.detach_segments or getattr(self.compressor, "detach_every", 0)
                if encoded is not None and every and number % every == 0:
                    encoded = encoded.detach()
                encoded = self.compressor.encode(segment, encoded, ratio)
        share = torch.tensor(counts, device=context.device) / sum(counts)
        return (torch.stack(losses) * share).sum()

    def _auxiliary(self, encoded: Any, batch: Batch, ratio: int, wanted: set[str]) -> dict[str, Tensor]:
        found = self.compressor.auxiliary(encoded, batch.context, ratio)
        if missing := sorted(wanted - set(found)):
            raise InputError(
                f"{self.compressor.name} has no loss {', '.join(missing)}; there are {', '.join([*LOSSES, *found])}"
            )
        return {name: found[name] for name in wanted}

    def teacher(self, batch: Batch) -> Tensor:
        """Logits [B, T, V] that the frozen model gives for all of `batch.ids` when it reads the whole context."""
        return self.base(torch.cat([batch.context, batch.ids], 1), batch.context.shape[1])

    def base(self, ids: Tensor, first: int) -> Tensor:
        """Logits [B, T - first, V] that the frozen model gives for `ids[:, first:]`; no gradient."""
        backbone = self.compressor.backbone
        with torch.no_grad(), self.compressor.lora.using(None):
            positions = torch.arange(ids.shape[1], device=ids.device)
            return backbone.logits(backbone.run(backbone.embed(ids), positions).hidden[:, first - 1 : -1])
