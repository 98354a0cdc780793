"""The one object that a wrapped model carries: method, budget, geometry, and what the last run did."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from longfit.attention.base import AttentionPatch
from longfit.budget import MemoryBudget, ModelShape, Plan, entry_bytes, plan
from longfit.cache import FULL, GROWTH, Allowance, FitCache, Ledger, layer_types
from longfit.compressors import KeepAll, KVCompressor, LearnedCompressor, PromptCompressor
from longfit.compressors.prompt.lm import LOGIT_ROWS
from longfit.errors import BudgetError, InputError, UnsupportedFeatureError, UnsupportedModelError
from longfit.families import switching_window, window_of
from longfit.report import FitReport
from longfit.shortening import target

logger = logging.getLogger("longfit")

ANY_LENGTH = 2**40
DEFAULT_CHUNK_TOKENS = 1024
MIN_CHUNK_TOKENS = 64
ANGLE_BYTES = FLOAT_BYTES = 4


@dataclass
class FitContext:
    """Everything that `wrap` decided.

    Attributes:
        method: the compressor.
        budget: as given.
        shape: sizes of the model.
        config: the text decoder's configuration.
        chunk_tokens: tokens of a chunk of prefill; None lets the plan choose.
        geometry: "original", "packed", or None: the method's own, but packed for inputs past the model's window.
        base_implementation: the attention backend underneath.
        patch: the attention of the full-attention layers; None for full attention.
        encoder: the learned compressor that makes a memory of the context; None for none.
        prompt: the prompt compressor that shortens the input first; None for none.
        free: no budget was given: what compresses the context does so to its own size.
        enabled: False inside `model.disabled()`.
        report: what the last run did.
        told_packed: it was said that positions are packed.
        observer: told, while a prefill runs, how many tokens are read and of how many; None for nobody.
    """

    method: KVCompressor
    budget: MemoryBudget
    shape: ModelShape
    config: PreTrainedConfig
    chunk_tokens: int | None
    geometry: str | None
    base_implementation: str
    patch: AttentionPatch | None = None
    encoder: LearnedCompressor | None = None
    prompt: PromptCompressor | None = None
    free: bool = False
    enabled: bool = True
    report: FitReport | None = None
    observer: Callable[[int, int], None] | None = None
    told_packed: bool = False

    def plan(
        self, batch_size: int = 1, tokens: int = ANY_LENGTH, packed: bool = False, indexed_tokens: int = 0
    ) -> Plan:
        """What the budget means for this model and method.

        `indexed_tokens` is the length of the input where it is known: what an attention offloads leaves an index.

        Raises:
            BudgetError: it cannot be met; the message has the smallest that would do.
        """
        shape, method = self.shape, self.method
        return plan(
            shape,
            tokens=tokens if shape.full_layers else min(tokens, shape.sliding_window),
            budget=self.budget,
            batch_size=batch_size,
            chunk_tokens=self.chunk_tokens or (self.encoder.segment_tokens if self.encoder else None),
            max_chunk_tokens=DEFAULT_CHUNK_TOKENS,
            entry_state_bytes=method.entry_state_bytes + (ANGLE_BYTES if packed else 0) + self._index_bytes(),
            layer_state_bytes=method.layer_state_bytes(shape.query_heads, shape.key_dim, shape.dtype_bytes)
            + self._layer_bytes(indexed_tokens),
            score_workspace=lambda chunk, kept: batch_size * self._workspace(chunk, kept),
            min_tokens=method.min_tokens,
            packed=packed,
        )

    def _index_bytes(self) -> int:
        """Bytes of the attention's index per key/value head and entry, with the room that its buffers grow by."""
        if self.patch is None:
            return 0
        grown = self.patch.entry_bytes(self.shape.key_dim, self.shape.dtype_bytes) * (1 + 1 / GROWTH)
        return math.ceil(grown) + 4 * len(self.patch.score_names)

    def _workspace(self, chunk: int, kept: int) -> int:
        """Bytes of scoring one row; where all layers are trimmed together, each also holds the untrimmed chunk."""
        shape, method = self.shape, self.method
        scoring = method.score_workspace(shape.query_heads, shape.kv_heads, shape.key_dim, chunk, kept)
        together = method.replays or (self.patch is not None and self.patch.stores == "released")
        held = entry_bytes(shape, method.entry_state_bytes) * chunk * shape.full_layers if together else 0
        attending = 0
        if self.patch is not None:
            sizes = shape.kv_heads, shape.query_heads, shape.key_dim, shape.dtype_bytes
            attending = self.patch.workspace(*sizes, chunk, kept)
        encoding = 0
        if self.encoder is not None:  # a segment in every layer, and the memory while it is joined and handed over
            copies = 3 * kept if self.encoder.memory == "kv" else 0
            encoding = entry_bytes(shape, 0) * (self.encoder.segment_tokens + copies) * shape.full_layers
        reading = 0
        if self.prompt is not None and self.prompt.reads:
            reading = entry_bytes(shape, 0) * self.prompt.held_tokens * shape.full_layers
            reading += 2 * FLOAT_BYTES * LOGIT_ROWS * int(getattr(self.config, "vocab_size", 0))
        return scoring + held + attending + encoding + reading

    def _layer_bytes(self, tokens: int) -> int:
        if self.patch is None:
            return 0
        shape = self.shape
        return self.patch.layer_bytes(tokens, shape.kv_heads, shape.query_heads, shape.key_dim, shape.dtype_bytes)

    @property
    def looks_at_questions(self) -> bool:
        """A step chooses with the question, where it is known."""
        return any(step is not None and step.query_aware for step in (self.prompt, self.encoder, self.method))

    def limit_of(self, cache: FitCache) -> int | None:
        """Tokens of a layer that the budget allows a cache; None for a ratio."""
        allowance = cache.allowance
        return cache.ledger.kept_tokens if allowance is None or not allowance.last else allowance.kept_tokens

    def new_cache(self, decoder: nn.Module, batch_size: int, tokens: int, new_tokens: int = 0) -> FitCache:
        """An empty cache for `batch_size` rows of up to `tokens` tokens and `new_tokens` to be generated.

        Raises:
            BudgetError: the budget cannot be met for this input.
            UnsupportedModelError: the model's RoPE changes within this input.
        """
        window, given = window_of(self.config), tokens
        allowance = self._allowance(batch_size, given, new_tokens)
        if self.prompt is not None:  # what is left of the prompt is all that the cache sees
            tokens = target(self.prompt, given, allowance, self.encoder is not None)
            self._check_window(self.prompt, tokens + new_tokens, window)
        packed = self._packed(tokens + new_tokens, window)
        if self.encoder is not None:
            self._check_encoder(self.encoder, tokens + new_tokens, window)
        if packed and self.patch is not None and self.patch.stores == "released":
            raise UnsupportedFeatureError(
                f"{self.patch.name} forwards tokens again at the positions that they had, and packed positions do not "
                f'know them; give up to {window:,} tokens and geometry="original"'
            )
        switch = switching_window(self.config)
        if switch is not None and not packed and tokens + new_tokens > switch:
            raise UnsupportedModelError(
                f"the RoPE of {self.config.model_type} changes for inputs longer than {switch:,} tokens, which a "
                'stream cannot follow; use wrap(..., geometry="packed")'
            )
        ratio = self.budget.keep_ratio
        known = given if ratio is not None else ANY_LENGTH
        made = self.plan(batch_size, known, packed, indexed_tokens=tokens + new_tokens)
        kept = made.kept_tokens
        chunk = made.chunk_tokens
        if packed and self.shape.full_layers:
            if self.budget.kept_tokens is None and ratio is None and kept > window - chunk:
                logger.warning(
                    "the budget would hold %s tokens a layer, the model's window only %s", kept, window - chunk
                )
                kept = window - chunk
            held = min(kept, self._length(tokens) + new_tokens, self._most_kept())
            chunk = min(chunk, window - held)
            if chunk < min(MIN_CHUNK_TOKENS, made.chunk_tokens, tokens):
                raise BudgetError(
                    f"packed positions: {held:,} kept tokens and a chunk have to fit the model's window of {window:,}; "
                    f'the largest budget that would do is "{max(1, window - MIN_CHUNK_TOKENS)} tokens"'
                )
        # Without a budget a learned memory takes what it takes.
        # Nothing trims behind a prompt compressor alone; only a promise in bytes bounds what is generated too.
        in_bytes = ratio is None and self.budget.kept_tokens is None
        unbounded = self.free or (allowance is not None and allowance.last and not in_bytes)
        ledger = Ledger(ANY_LENGTH, None, packed) if unbounded else Ledger(None if ratio else kept, ratio, packed)
        if packed and self.method.ragged and self.shape.full_layers:
            # The average fits; a head may want many times that. A chunk comes after it, twice where it is replayed.
            again = chunk + len(getattr(self.method, "repeat_ids", ())) if self.method.replays else 0
            after = chunk + again + new_tokens
            ledger.head_limit = max(held, window - after)
        cache = FitCache(self.config, decoder, self.method, ledger, window, self.patch)
        cache.chunk_tokens, cache.allowance = chunk, allowance
        return cache

    def _allowance(self, batch_size: int, tokens: int, new_tokens: int) -> Allowance | None:
        """What the prompt compressor may leave of a prompt of `tokens` tokens; None without one, or without a budget.

        Nothing trims behind a prompt compressor alone: a budget in tokens or per cent is then what the prompt becomes,
        and one in bytes leaves room for what is generated.
        """
        if self.prompt is None or self.free:
            return None
        last = self.encoder is None and isinstance(self.method, KeepAll)
        if self.budget.keep_ratio is not None:
            return Allowance(None, self.budget.keep_ratio, last)
        in_bytes = self.budget.kept_tokens is None
        kept = self.plan(batch_size).kept_tokens
        return Allowance(kept, None, last, new_tokens if last and in_bytes else 0)

    def _check_window(self, prompt: PromptCompressor, length: int, window: int) -> None:
        if length > window and self.encoder is None and isinstance(self.method, KeepAll):
            raise BudgetError(
                f"{prompt.name} would leave {length:,} tokens with the answer, more than the model's window of "
                f'{window:,}; give a budget such as "{window // 2} tokens", or a KV method behind it'
            )

    def _length(self, tokens: int) -> int:
        """Entries that an input of `tokens` tokens becomes before anything is trimmed."""
        encoder = self.encoder
        if encoder is None or tokens <= encoder.window_tokens:
            return tokens
        return encoder.slots_for(tokens - encoder.window_tokens) + encoder.window_tokens

    def _check_encoder(self, encoder: LearnedCompressor, length: int, window: int) -> None:
        if not encoder.packs and length > window:
            raise UnsupportedFeatureError(
                f"{encoder.name} keeps the positions of the text, so an input may not pass the model's window of "
                f"{window:,} tokens, and this one has {length:,}; use a learned compressor with packed positions"
            )
        if encoder.segment_tokens + encoder.window_tokens > window:
            raise InputError(
                f"{encoder.name}: segment_tokens={encoder.segment_tokens} passes the model's window of {window:,}"
            )

    def _most_kept(self) -> int:
        """Entries that any full-attention layer holds at most because its attention sees no more."""
        if self.patch is None:
            return ANY_LENGTH
        types, _ = layer_types(self.config)
        full = [place for place, kind in enumerate(types) if kind == FULL]
        patch, n = self.patch, len(types)
        return max(patch.most_kept(place, n) if patch.covers(place, n) else ANY_LENGTH for place in full)

    def _packed(self, length: int, window: int) -> bool:
        if self.encoder is not None:
            return self.encoder.packs
        own = self.geometry or self.method.geometry
        if self.patch is not None and self.patch.extends and self.geometry is None and own == "original":
            return False
        if self.geometry is None and own == "original" and length > window:
            say = logger.debug if self.told_packed else logger.warning
            self.told_packed = True
            say(
                "%s tokens are past the model's window of %s: positions are packed (geometry='packed'); "
                "pass geometry= to wrap() to choose yourself",
                length,
                window,
            )
            return True
        return own == "packed"

    def check_growth(self, ledger: Ledger, tokens: int) -> None:
        """
        Raises:
            UnsupportedFeatureError: a context with these positions cannot grow to `tokens` tokens.
        """
        window, extends = window_of(self.config), self.patch is not None and self.patch.extends
        switch = switching_window(self.config)
        if ledger.packed or (tokens <= (switch or window)) or (switch is None and (extends or self.geometry)):
            return
        raise UnsupportedFeatureError(
            f"{tokens:,} tokens together pass the model's window of {switch or window:,}, and this memory has the "
            'positions of a shorter text; compress both texts in one go, or this one first with geometry="packed"'
        )

    @contextmanager
    def observed(self, observer: Callable[[int, int], None] | None) -> Iterator[None]:
        """Inside, `observer(read, total)` is called after every chunk of a prefill."""
        saved, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = saved

    @contextmanager
    def lossless(self, chunk_tokens: int) -> Iterator[None]:
        """Everything is kept, in chunks of this size: what the streaming path itself does to the numbers."""
        saved = self.budget, self.chunk_tokens, self.geometry, self.prompt
        self.budget, self.chunk_tokens, self.geometry = MemoryBudget(keep_ratio=1.0), chunk_tokens, "original"
        self.prompt = None
        try:
            yield
        finally:
            self.budget, self.chunk_tokens, self.geometry, self.prompt = saved
