"""A wrapped model's class: the base model's own, with a forward that streams."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longfit.attention import NAMES
from longfit.cache import FitCache
from longfit.calls import check_ids, prompt_of, refuse, tokens_of
from longfit.context import ANY_LENGTH, FitContext
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.families import decoder_of
from longfit.memory import Memory, fingerprint
from longfit.meter import PeakMeter
from longfit.report import FitReport
from longfit.reporting import report_of
from longfit.starting import cache_to_compress, cache_to_generate
from longfit.stream import Stream


class FitMixin:
    """What wrapping adds to a model. Used through `wrap`, never by itself."""

    longfit: FitContext
    set_attn_implementation: Callable[[str], None]  # the base model's

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
        self.set_attn_implementation(context.base_implementation)
        try:
            yield
        finally:
            context.enabled = True
            self.set_attn_implementation(NAMES[context.base_implementation])

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
        cache = cache_to_generate(self, ids, kwargs, memory, question_tokens)
        kwargs["past_key_values"] = cache
        meter = PeakMeter(ids.device)
        try:
            return base.generate(*args, **kwargs)
        finally:
            self.longfit.report = report_of(self.longfit, cache, meter.peak_bytes())

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
        cache = cache_to_compress(self, input_ids, attention_mask, question_ids, memory)
        meter, aside = PeakMeter(input_ids.device), 0
        if question_ids is not None:
            aside = question_ids.shape[1]
            input_ids = torch.cat([input_ids, question_ids], 1)
            if attention_mask is not None:
                attention_mask = torch.nn.functional.pad(attention_mask, (0, aside), value=1)
        stream_of(self, cache).fill({"input_ids": input_ids, "attention_mask": attention_mask}, aside)
        self.longfit.report = report_of(self.longfit, cache, meter.peak_bytes())
        if cache.allowance is not None and cache.allowance.last:  # what is asked of it comes on top
            cache.ledger.kept_tokens, cache.ledger.keep_ratio = ANY_LENGTH, None
        return Memory(cache, cache.tokens_in, self._fingerprint(), question_ids)

    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self, self.longfit)


@functools.cache
def fitted(base: type) -> type:
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
            outputs = stream_of(self, cache).run(arguments)
        if cache.step.phase == "prefill":
            context.report = report_of(context, cache, None)
        return outputs if return_dict is not False else outputs.to_tuple()

    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (FitMixin, base), members)


def base_class(model: Any) -> Any:
    """The class that a wrapped model had before."""
    return type(model).__mro__[2]


def base_forward(model: Any) -> Any:
    """The forward of a wrapped model's own class, with the attention that longfit put under it."""
    return functools.partial(base_class(model).forward, model)


def stream_of(model: Any, cache: FitCache) -> Stream:
    """What reads tokens into a cache, by a wrapped model."""
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
