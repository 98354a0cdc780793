"""wrap, unwrap, disabled: the drop-in wrapper."""

import copy
import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longfit.attention import NAMES, AttentionPatch
from longfit.budget import MemoryBudget, ModelShape
from longfit.cache import FULL, FitCache, layer_types
from longfit.calls import check_ids, prompt_of, refuse, setting, tokens_of
from longfit.choosing import compressors_of, patch_of
from longfit.compressors import Encoded, KeepAll, KVCompressor
from longfit.context import ANY_LENGTH, FitContext
from longfit.errors import InputError, LongfitError, UnsupportedFeatureError, UnsupportedModelError
from longfit.families import TESTED, base_implementation, check, decoder_of, same_as_base, text_config
from longfit.memory import Memory, fingerprint
from longfit.meter import PeakMeter
from longfit.report import FitReport
from longfit.stream import Stream

LOSSLESS_TOLERANCE = 0.05


class FitMixin:
    """What wrapping adds to a model. Used through `wrap`, never by itself."""

    longfit: FitContext

    @property
    def fit_report(self) -> FitReport:
        """What the last `generate`, `compress` or forward kept and spent.

        Raises:
            InputError: nothing has run yet.
        """
        if self.longfit.report is None:
            raise InputError("nothing has run yet: call generate() or compress() first")
        return self.longfit.report

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, bit for bit."""
        context = self.longfit
        if not context.enabled:
            yield
            return
        context.enabled = False
        _set_attention(self, context.base_implementation)
        try:
            yield
        finally:
            context.enabled = True
            _set_attention(self, NAMES[context.base_implementation])

    @torch.no_grad()
    def generate(
        self, *args: Any, memory: Memory | None = None, question_tokens: int | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, inside the budget.

        Args:
            *args, **kwargs: as for the base model; pass the whole prompt.
            memory: a compressed context to continue from; the ids are then only what follows it. The memory itself
                does not change.
            question_tokens: the last tokens of each row are the question: methods that look at the question score
                every chunk with it.

        Raises:
            InputError: empty input, padding on the right, a question longer than the prompt.
            UnsupportedFeatureError: an argument that cannot work with a compressor.
            BudgetError: the budget cannot be met for this batch or input.
        """
        base: Any = super()
        if not self.longfit.enabled:
            if memory is not None or question_tokens is not None:
                raise UnsupportedFeatureError("memory and question_tokens need the wrapper; leave `model.disabled()`")
            return base.generate(*args, **kwargs)
        ids = prompt_of(args, kwargs)
        refuse(self, kwargs)
        cache = self._cache_for(ids, kwargs, memory, question_tokens)
        kwargs["past_key_values"] = cache
        meter = PeakMeter(ids.device)
        try:
            return base.generate(*args, **kwargs)
        finally:
            self.longfit.report = self._report(cache, meter.peak_bytes())

    @torch.no_grad()
    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Memory:
        """Read a context once and keep what the budget allows.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], zeros for left padding.
            question_ids: [B, Q] a question to choose by, for methods that look at it; it is not stored, and the memory
                is then for `generate(question_ids, memory=memory)` only.
            memory: what was read before; the context is read after it, into a copy, within the same budget.

        Returns:
            A memory for `generate(ids, memory=memory)`, any number of times; for any question, unless one was given.

        Raises:
            UnsupportedFeatureError: a question for a method that does not look at one, or none for one that needs it.
            BudgetError: the budget cannot be met for this batch or input.
        """
        if not self.longfit.enabled:
            raise UnsupportedFeatureError("compress() needs the wrapper; leave `model.disabled()`")
        check_ids(input_ids)
        B, T = input_ids.shape
        if memory is not None:
            cache = memory.grown(self, input_ids, attention_mask, question_ids)
        else:
            cache = self.longfit.new_cache(decoder_of(self), B, T)  # type: ignore[arg-type]
        meter, aside = PeakMeter(input_ids.device), 0
        if question_ids is not None:
            aside = self._ask_about(cache, input_ids, question_ids)
            input_ids = torch.cat([input_ids, question_ids], 1)
            if attention_mask is not None:
                attention_mask = torch.nn.functional.pad(attention_mask, (0, aside), value=1)
        _stream(self, cache).fill({"input_ids": input_ids, "attention_mask": attention_mask}, aside)
        self.longfit.report = self._report(cache, meter.peak_bytes())
        if cache.allowance is not None and cache.allowance.last:  # what is asked of it comes on top
            cache.ledger.kept_tokens, cache.ledger.keep_ratio = ANY_LENGTH, None
        return Memory(cache, cache.tokens_in, self._fingerprint(), question_ids)

    def _ask_about(self, cache: FitCache, input_ids: Tensor, question_ids: Tensor) -> int:
        """Tell a cache that its context is followed by a question, and how long that is."""
        context = self.longfit
        if not context.looks_at_questions:
            names = [step.name for step in (context.prompt, context.encoder, context.method) if step and step.name]
            raise UnsupportedFeatureError(
                f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} not look at the question; compress "
                "without it"
            )
        if question_ids.ndim != 2 or question_ids.shape[0] != input_ids.shape[0] or not question_ids.shape[1]:
            raise InputError(
                f"question_ids has shape {tuple(question_ids.shape)}; expected [{input_ids.shape[0]}, tokens]"
            )
        cache.question_tokens, cache.question_aware = question_ids.shape[1], True
        return int(question_ids.shape[1])

    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self, self.longfit)

    @torch.no_grad()
    def _reread_ids(self, cache: FitCache) -> None:
        """Read what a prompt compressor had left, as an empty cache knows it, into the cache."""
        assert cache.shortened is not None
        _stream(self, cache).fill_padded(cache.shortened.ids, cache.shortened.own_padding)

    @torch.no_grad()
    def _reread(self, cache: FitCache, encoded: Encoded, ids: Tensor) -> None:
        """Read saved soft slots, and the ids after them, into an empty cache."""
        _stream(self, cache).read_again(encoded, ids)

    def _cache_for(
        self, ids: Tensor, kwargs: dict[str, Any], memory: Memory | None, question_tokens: int | None
    ) -> FitCache:
        """The cache that a call of `generate` fills: new, a memory's copy, or the one of an earlier turn."""
        B, T = ids.shape
        repeats = max(setting(self, kwargs, "num_beams"), setting(self, kwargs, "num_return_sequences"))
        given = kwargs.get("past_key_values")
        if question_tokens is not None and not 0 < question_tokens <= T:
            raise InputError(f"question_tokens={question_tokens} of a prompt of {T} tokens")
        if memory is not None:
            if given is not None:
                raise InputError("give either memory or past_key_values")
            memory.check_question(ids)
            cache = memory.fork(self._fingerprint())
            if cache.rows not in (B, 1):
                raise InputError(f"the memory has {cache.rows} rows and the question {B}")
            cache.batch_repeat_interleave(B // cache.rows * repeats)
            mask = kwargs.get("attention_mask")
            if mask is not None and not bool(mask.bool().all()):
                raise InputError(
                    "a question to a memory cannot be padded; ask questions of different length one by one"
                )
            kwargs["attention_mask"] = ids.new_ones(B, cache.get_seq_length() + T)
        elif given is None:
            new = setting(self, kwargs, "max_new_tokens")
            cache = self.longfit.new_cache(decoder_of(self), B * repeats, T, new)  # type: ignore[arg-type]
        elif isinstance(given, FitCache):
            cache = given
        else:
            raise UnsupportedFeatureError(
                f"past_key_values is a {type(given).__name__}; a wrapped model continues its own caches only"
            )
        if question_tokens:
            cache.question_tokens = question_tokens
            cache.question_aware = self.longfit.looks_at_questions
        return cache

    def _report(self, cache: FitCache, peak_bytes: int | None) -> FitReport:
        kept, seen = cache.kept_tokens, cache.tokens_in
        bounded = cache.bounded
        per_layer = [[n for row in layer.kept_by_head() for n in row] for layer in bounded]
        return FitReport(
            method=named(self.longfit),
            attention=None if self.longfit.patch is None else repr(self.longfit.patch),
            geometry="packed" if cache.ledger.packed else "original",
            question_aware=cache.question_aware,
            tokens_in=seen,
            kept_tokens=kept,
            keep_ratio=kept / seen if seen else 0.0,
            kept_per_layer=[sum(heads) / len(heads) if heads else 0.0 for heads in per_layer],
            kept_per_head=[layer.kept_by_head()[0] if layer.parts else [] for layer in bounded],
            kv_bytes=cache.nbytes,
            full_kv_bytes=(cache.rows or 1) * self.longfit.shape.full_kv_bytes(seen),
            budget="none" if self.longfit.free else str(self.longfit.budget),
            limit_tokens=None if self.longfit.free else self.longfit.limit_of(cache),
            prompt_tokens=None if cache.shortened is None else max(len(kept) for kept in cache.shortened.places),
            chunk_tokens=cache.chunk_tokens,
            chunks=cache.chunks,
            peak_bytes=peak_bytes,
            prefill_seconds=cache.prefill_seconds,
            decode_seconds=cache.decode_seconds,
            score_seconds=cache.score_seconds,
            new_tokens=cache.new_tokens,
            read_bytes=cache.read_bytes,
            offloaded_bytes=cache.offloaded_bytes,
            page_hits=cache.page_hits,
            page_reads=cache.page_reads,
            rebuilt_tokens=cache.rebuilt_tokens,
        )


def wrap(
    model: Any,
    compressor: str | KVCompressor | list[Any] | None = None,
    *,
    budget: str | MemoryBudget | None = None,
    total: str | None = None,
    attention: str | AttentionPatch | None = None,
    chunk_tokens: int | None = None,
    geometry: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """Make a causal LM take input of any length within a memory budget. The same object comes back.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        compressor: a name (see `longfit.compressors.available()`) or an object; "snapkv" where no attention is named;
            or a list, left to right: a prompt compressor, a learned one, one that trims the cache.
            With an attention and no compressor everything is kept that the attention can still look at.
        budget: "64MiB", "2048 tokens" (per layer) or "25%" (of the input).
        total: "2GiB", weights included; instead of `budget`.
        attention: what stands in for full attention: a name (see `longfit.attention.available()`) or an object.
        chunk_tokens: tokens of a chunk of prefill; by default up to 1,024, fewer where the budget is small.
        geometry: "original" positions with holes or "packed" ones; by default the method's own, and packed for inputs
            past the model's window.
        tokenizer: the model's, for prompt compressors; by default the one that lies with the model.
        options: of a compressor given by name; of the attention, where that is given by name and no compressor is.

    Returns:
        The model, now also with `fit_report`, `compress`, `disabled` and two more arguments of `generate`.

    Raises:
        UnknownNameError, UnsupportedModelError, BudgetError, InputError: before any work; each says what would do.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, FitMixin):
        unwrap(inner)
    check(inner)
    if geometry not in (None, "original", "packed"):
        raise InputError(f'geometry={geometry!r}; it is "original" or "packed"')
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"chunk_tokens={chunk_tokens}; it has to be at least 1")
    # Copies: bound to this model, whatever else they are used for.
    patch = None if attention is None else copy.copy(patch_of(attention, options if compressor is None else {}))
    prompt, encoder, method = compressors_of("snapkv" if compressor is None and patch is None else compressor, options)
    free = isinstance(method, KeepAll) and not budget and not total
    budget = "100%" if free else budget
    if geometry is not None and encoder is not None:
        raise InputError(f"geometry={geometry!r}: {encoder.name} places its memory itself")
    if encoder is not None and patch is not None and patch.stores == "released":
        raise UnsupportedFeatureError(f"{patch.name} forwards tokens again, and {encoder.name}'s slots are no tokens")
    method.bind(inner)
    if patch is not None:
        bind_patch(patch, inner)
        if patch.stores == "released" and not isinstance(method, KeepAll):
            raise UnsupportedFeatureError(
                f"{patch.name} itself decides which tokens stay, the same in all layers, so no compressor works beside "
                "it; leave the compressor out and give the budget alone"
            )
    context = FitContext(
        method=method,
        budget=MemoryBudget.parse(budget, total=total),
        shape=model_shape(inner),
        config=text_config(inner),
        chunk_tokens=chunk_tokens,
        geometry=geometry,
        base_implementation=base_implementation(inner),
        patch=patch,
        encoder=encoder,
        prompt=prompt,
        free=free and (encoder is not None or prompt is not None),
    )
    if context.budget.keep_ratio is None:
        context.plan()
    elif not context.shape.full_layers and context.budget.keep_ratio < 1:
        raise UnsupportedModelError(
            f"every layer of {type(inner).__name__} has a sliding window of {context.shape.sliding_window} tokens and "
            "stays as it is; there is nothing to compress to a ratio"
        )
    if prompt is not None:
        prompt.bind(inner, tokenizer)
    if encoder is not None:
        encoder.bind(inner)
    _become(inner, _fitted(cast(Any, type(inner))))
    inner.longfit = context
    _set_attention(inner, NAMES[context.base_implementation])
    if context.config.model_type not in TESTED:
        _verify(inner)
    return model


def unwrap(model: Any) -> Any:
    """Undo `wrap`: the same object comes back, of its own class."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, FitMixin):
        context = inner.longfit
        _set_attention(inner, context.base_implementation)
        for step in (context.prompt, context.encoder):
            if step is not None:
                step.release()
        del inner.longfit
        _become(inner, type(inner).__mro__[2])
    return model


def _become(model: Any, cls: type) -> None:
    """Change the class. accelerate keeps a bound forward on models that it dispatched, which has to follow."""
    model.__class__ = cls
    if "_old_forward" in vars(model):
        model._old_forward = types.MethodType(cls.forward, model)  # type: ignore[attr-defined]


@functools.cache
def _fitted(base: type) -> type:
    """The subclass of a model class whose forward streams. It keeps the base's name, so that pipelines, model cards
    and saved configurations see the architecture that they know."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = self.longfit
        arguments = _bind(base, self, args, kwargs)
        cache = arguments.get("past_key_values")
        wants_cache = arguments.get("use_cache")
        if wants_cache is None:
            wants_cache = self.config.use_cache
        if not context.enabled or (cache is None and (self.training or not wants_cache)):
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return_dict = arguments.pop("return_dict", None)
        arguments.pop("use_cache", None)
        arguments.pop("past_key_values", None)
        with torch.no_grad():
            if cache is None:
                tokens, _ = tokens_of(arguments)
                cache = context.new_cache(decoder_of(self), tokens.shape[0], tokens.shape[1])
            elif not isinstance(cache, FitCache):
                raise UnsupportedFeatureError(
                    f"past_key_values is a {type(cache).__name__}; a wrapped model continues its own caches only, "
                    "use `model.disabled()` for others"
                )
            outputs = _stream(self, cache).run(arguments)
        context.report = self._report(cache, None) if cache.step.phase == "prefill" else context.report
        return outputs if return_dict is not False else outputs.to_tuple()

    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (FitMixin, base), members)


def base_forward(model: Any) -> Any:
    """The forward of a wrapped model's own class, with the attention that longfit put under it."""
    return functools.partial(type(model).__mro__[2].forward, model)  # type: ignore[attr-defined]


def _stream(model: Any, cache: FitCache) -> Stream:
    context = model.longfit
    return Stream(model, base_forward(model), decoder_of(model), cache, context.encoder, context.free, context.prompt)


def _bind(base: type, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments by name."""
    signature = inspect.signature(base.forward)  # type: ignore[attr-defined]
    bound = signature.bind_partial(model, *args, **kwargs).arguments
    bound.pop("self", None)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return bound


def named(context: FitContext) -> str:
    """The compressors of a context, for its report."""
    before = [repr(step) for step in (context.prompt, context.encoder) if step is not None]
    return ", ".join(before if before and isinstance(context.method, KeepAll) else [*before, repr(context.method)])


def bind_patch(patch: AttentionPatch, model: Any) -> None:
    """Let the patch take what it needs of the model.

    Raises:
        UnsupportedModelError: no layer of the model is the patch's to stand in at, or it cannot work with this model.
    """
    types, _ = layer_types(text_config(model))
    if not any(kind == FULL and patch.covers(place, len(types)) for place, kind in enumerate(types)):
        raise UnsupportedModelError(
            f"none of the {len(types)} layers of {type(model).__name__} is a full-attention layer that {patch!r} "
            "stands in at: sliding layers and the layers that the patch leaves dense stay as they are"
        )
    patch.bind(model)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Sizes of a loaded model."""
    weights = model.get_memory_footprint(return_buffers=False)
    dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
    return ModelShape.from_config(text_config(model), weights_bytes=int(weights), dtype_bytes=dtype.itemsize)


def _set_attention(model: Any, name: str) -> None:
    model.set_attn_implementation(name)


def _verify(model: Any) -> None:
    """A family that the tests do not know is checked on the spot.

    Raises:
        UnsupportedModelError: streaming without dropping anything does not give the base model's logits.
    """
    try:
        error = same_as_base(model)
    except LongfitError:
        unwrap(model)
        raise
    except Exception as failure:
        unwrap(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run through longfit's cache: {failure}"
        ) from failure
    if error > LOSSLESS_TOLERANCE:
        unwrap(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} is not among the tested families and its logits change by {error:.2g} of their "
            "spread when it is streamed with nothing dropped; it cannot be wrapped correctly"
        )
