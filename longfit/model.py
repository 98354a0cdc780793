"""wrap and unwrap: the drop-in wrapper."""

import copy
import types
from typing import Any, cast

from longfit.attention import NAMES, AttentionPatch
from longfit.budget import MemoryBudget
from longfit.choosing import bind_patch, compressors_of, patch_of
from longfit.compressors import KeepAll, KVCompressor
from longfit.context import FitContext
from longfit.errors import InputError, LongfitError, UnsupportedFeatureError, UnsupportedModelError
from longfit.families import TESTED, base_implementation, check, model_shape, same_as_base, text_config
from longfit.fitted import FitMixin, base_class, fitted

LOSSLESS_TOLERANCE = 0.05


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
    inner = _inner(model)
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
    _become(inner, fitted(cast(Any, type(inner))))
    inner.longfit = context
    inner.set_attn_implementation(NAMES[context.base_implementation])
    if context.config.model_type not in TESTED:
        _verify(inner)
    return model


def unwrap(model: Any) -> Any:
    """Undo `wrap`: the same object comes back, of its own class."""
    inner = _inner(model)
    if isinstance(inner, FitMixin):
        context = inner.longfit
        inner.set_attn_implementation(context.base_implementation)
        for step in (context.prompt, context.encoder):
            if step is not None:
                step.release()
        del inner.longfit
        _become(inner, base_class(inner))
    return model


def _inner(model: Any) -> Any:
    """The transformers model: of a PEFT model the one that it is around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _become(model: Any, cls: type) -> None:
    """Change the class. accelerate keeps a bound forward on models that it dispatched, which has to follow."""
    model.__class__ = cls
    if "_old_forward" in vars(model):
        model._old_forward = types.MethodType(cls.forward, model)  # type: ignore[attr-defined]


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
