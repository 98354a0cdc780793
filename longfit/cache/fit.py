"""The cache that a wrapped model fills: bounded layers, one ledger, one step."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from longfit.cache.kinds import FULL, layer_types
from longfit.cache.layer import BoundedLayer
from longfit.cache.ledger import Ledger
from longfit.cache.part import Part
from longfit.cache.release import release
from longfit.cache.renumber import renumber
from longfit.cache.rotary import Rotary
from longfit.cache.shortened import Allowance, Shortened
from longfit.cache.sliding import SlidingLayer
from longfit.cache.slow_tier import SlowTier
from longfit.cache.step import Step
from longfit.cache.together import trim_together


class FitCache(Cache):
    """One bounded layer for every full-attention layer of the model; sliding layers stay as the model has them.

    Args:
        config: the model's configuration.
        decoder: the module that holds the rotary embedding, or None.
        method: the compressor.
        ledger: limits and geometry.
        max_positions: rotary positions that the packed geometry may use.
        patch: the attention of the full-attention layers, None for full attention.

    Attributes:
        encoded: what a learned compressor made of the context (slots and states; keys and values are in the layers
            only); None without one.
        slot_spans: [M, 2] or [B, M, 2] for each slot of a learned compressor the first token of the context that it
            stands for, and the one after the last; None without one, or where rows were compressed apart.
        raw_ids: [B, T] the ids that were read raw after soft slots, from which slots can be read again.
        allowance: what a prompt compressor may leave of a prompt; None without a budget, or without one.
        shortened: what it left; None where it left everything.

    Raises:
        UnsupportedModelError: a layer type is neither full nor sliding attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        decoder: nn.Module | None,
        method: Any,
        ledger: Ledger,
        max_positions: int,
        patch: Any = None,
    ) -> None:
        types, arguments = layer_types(config)
        full = types.count(FULL)
        self.config, self.step, self.ledger, self.method = config, Step(), ledger, method
        self.max_positions, self.patch = max_positions, patch
        self.rows = self.columns = self.chunks = self.new_tokens = self.question_tokens = self.rebuilt_tokens = 0
        self.chunk_tokens = 1
        self.question_aware = False
        self.encoded: Any = None
        self.slot_spans: Tensor | None = None
        self.raw_ids: Tensor | None = None
        self.allowance: Allowance | None = None
        self.shortened: Shortened | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        layers: list[BoundedLayer | SlidingLayer] = []
        for place, (kind, kwargs) in enumerate(zip(types, arguments, strict=True)):
            rotary = None if decoder is None else Rotary.of(decoder, kind)
            if kind == FULL:
                index = sum(isinstance(layer, BoundedLayer) for layer in layers)
                layers.append(BoundedLayer(index, full, method, ledger, self.step, rotary, patch, (place, len(types))))
            else:
                layers.append(SlidingLayer(kwargs["sliding_window"], self.step, rotary))
        super().__init__(layers=cast(Any, layers))
        self.own_layers = layers

    # -- accounts -------------------------------------------------------------------------------------------------

    @property
    def bounded(self) -> list[BoundedLayer]:
        return [layer for layer in self.own_layers if isinstance(layer, BoundedLayer)]

    def parts_of(self, row: int) -> list[tuple[BoundedLayer, Part]]:
        """The parts of a row, layer by layer and head by head, and whose they are."""
        return [(layer, p) for layer in self.bounded for p in layer.parts if p.rows.start <= row < p.rows.stop]

    @property
    def seen(self) -> int:
        """Columns read so far, padding included: of the shorter prompt, where a prompt compressor made it shorter."""
        return self.own_layers[0].get_seq_length() if self.own_layers else 0

    @property
    def tokens_in(self) -> int:
        """Real tokens of the longest row, those that a prompt compressor left out included."""
        if self.shortened is not None:
            return self.seen + self.shortened.columns - min(self.shortened.padding)
        return self.seen - min(self.ledger.padding or [0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far as `generate` counts them: those that a prompt compressor left out included."""
        return super().get_seq_length(layer_idx) + (self.shortened.columns if self.shortened is not None else 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns so far as the layers count them."""
        return super().get_seq_length(layer_idx)

    def sources(self, row: int, positions: Tensor) -> Tensor:
        """Places among the row's tokens as given, of entries at `positions`."""
        return positions if self.shortened is None else self.shortened.sources(row, positions)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers between forwards."""
        return sum(layer.nbytes for layer in self.own_layers)

    @property
    def kept_tokens(self) -> float:
        """Entries kept per layer, averaged over rows and heads."""
        heads = [n for layer in self.bounded for row in layer.kept_by_head() for n in row]
        return sum(heads) / len(heads) if heads else 0.0

    @property
    def read_bytes(self) -> int:
        """Bytes of keys, values and indexes that attention has read while decoding."""
        return sum(layer.read_bytes for layer in self.bounded)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of keys and values on the slow side."""
        return sum(tier.slow_bytes for tier in self._tiers)

    @property
    def page_hits(self) -> int:
        """Pages of the slow side that were asked for and had been brought in before, by head."""
        return sum(tier.hits for tier in self._tiers)

    @property
    def page_reads(self) -> int:
        """Pages that were read from the slow side, by head."""
        return sum(tier.reads for tier in self._tiers)

    @property
    def _tiers(self) -> list[SlowTier]:
        return [part.tier for layer in self.bounded for part in layer.parts if part.tier is not None]

    @property
    def releases(self) -> bool:
        """All layers drop the same tokens, which may be forwarded again (see `longfit.cache.release`)."""
        return self.patch is not None and self.patch.stores == "released"

    @property
    def score_seconds(self) -> float:
        return sum(layer.score_seconds for layer in self.bounded)

    # -- one forward ----------------------------------------------------------------------------------------------

    def begin(self, columns: int, padding: list[int] | None, batch: int, **step: Any) -> Tensor:
        """Set the step of the next forward and give its rotary positions [B, columns].

        Args:
            columns: tokens of the forward, probes and tokens that come again included.
            padding: for each row its left padding columns; only read by the first forward.
            batch: rows of the forward.
            step: fields of `Step`.
        """
        if self.ledger.padding is None:
            self.ledger.padding = list(padding or [0] * batch)
            self.ledger.base = [0] * batch
            self.rows = batch
        self.step.__dict__.update(Step(**step).__dict__)
        again, in_front = self.step.again or [[] for _ in self.ledger.padding], self.step.again_columns
        in_step = [
            min(max(p - self.seen, 0), columns - in_front) + in_front - len(row)
            for p, row in zip(self.ledger.padding, again, strict=True)
        ]
        self.step.padding = in_step
        self.rebuilt_tokens += sum(len(row) for row in again)
        if self.ledger.packed:
            renumber(self, columns)
        else:
            self.ledger.base = [max(self.seen - p, 0) for p in self.ledger.padding]
        fresh = torch.tensor([start + len(row) for start, row in zip(in_step, again, strict=True)])
        offsets = torch.arange(columns)[None] - fresh[:, None]
        self.columns = columns
        positions = offsets.clamp(min=0) + torch.tensor(self.ledger.base)[:, None]
        for places, start, row in zip(positions, in_step, again, strict=True):
            places[start : start + len(row)] = torch.tensor(row, dtype=places.dtype)
        if self.step.phase == "decode":
            self._make_room()
        return positions

    def asking_tokens(self, total: int, padding: list[int]) -> int:
        """Tokens at the end of a prompt that are read one by one, with released ones; none where none are released.

        `total` columns will have been seen then, `padding` of each row on the left.
        """
        if not self.releases:
            return 0
        fits = all(total - p <= layer.limit(p, total) for p in padding for layer in self.bounded)
        return 0 if fits else self.patch.asking_tokens

    def _make_room(self) -> None:
        if self.releases:
            return
        if self.method.replays:
            kept = self.ledger.kept_limit(self.seen)
            trim_together(self, self.seen + 1, reserve=max(1, kept // 64))
            return
        for layer in self.bounded:
            layer.make_room()

    def end(self) -> None:
        """After a forward: its token ids go, and so does what a patch releases; packed positions move on."""
        self.step.ids = None
        if self.releases:
            release(self)
        if self.ledger.packed:
            stored = self.columns - self.step.probe_tokens
            self.ledger.base = [
                base + max(stored - padding, 0)
                for base, padding in zip(self.ledger.base, self.step.padding, strict=True)
            ]

    # -- copies ---------------------------------------------------------------------------------------------------

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, as `generate` does with its inputs for beams and several return sequences."""
        super().batch_repeat_interleave(repeats)
        for name in ("padding", "base", "blank"):
            values = getattr(self.ledger, name)
            if values is not None:
                setattr(self.ledger, name, [v for v in values for _ in range(repeats)])
        self.rows *= repeats
        if self.encoded is not None:
            self.encoded = self.encoded.repeated(repeats)
        if self.slot_spans is not None and self.slot_spans.ndim == 3:
            self.slot_spans = self.slot_spans.repeat_interleave(repeats, 0)
        if self.shortened is not None:
            self.shortened = self.shortened.repeated(repeats)

    def fork(self) -> "FitCache":
        """An independent copy; the method and the rotary modules are shared."""
        shared = [
            self.config,
            self.method,
            self.patch,
            self.encoded,
            *(layer.rotary for layer in self.own_layers if layer.rotary is not None),
        ]
        return copy.deepcopy(self, {id(thing): thing for thing in shared})
