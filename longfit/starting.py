"""The cache that a call fills: a new one, a copy of a memory's, or that of an earlier turn."""

from typing import Any

from torch import Tensor

from longfit.cache import FitCache
from longfit.calls import setting
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.families import decoder_of
from longfit.memory import Memory, fingerprint


def cache_to_generate(
    model: Any, ids: Tensor, kwargs: dict[str, Any], memory: Memory | None, question_tokens: int | None
) -> FitCache:
    """The cache for a call of `generate` with ids [B, T].

    Args:
        model: wrapped.
        kwargs: of the call; with a memory, their mask becomes one of the memory's columns and the ids.
        memory: what the ids follow.
        question_tokens: the last tokens of each row are the question.

    Raises:
        InputError: a question or a memory that does not go with the ids, or both a memory and another cache.
        FingerprintError: the memory was made by another model or method.
        UnsupportedFeatureError: another cache than longfit's own.
        BudgetError: the budget cannot be met for this batch or input.
    """
    B, T = ids.shape
    repeats = max(setting(model, kwargs, "num_beams"), setting(model, kwargs, "num_return_sequences"))
    given = kwargs.get("past_key_values")
    if question_tokens is not None and not 0 < question_tokens <= T:
        raise InputError(f"question_tokens={question_tokens} of a prompt of {T} tokens")
    if memory is not None:
        if given is not None:
            raise InputError("give either memory or past_key_values")
        cache = _continued(model, memory, ids, kwargs.get("attention_mask"), repeats)
        kwargs["attention_mask"] = ids.new_ones(B, cache.get_seq_length() + T)
    elif given is None:
        new_tokens = setting(model, kwargs, "max_new_tokens")
        cache = model.longfit.new_cache(decoder_of(model), B * repeats, T, new_tokens)
    elif isinstance(given, FitCache):
        cache = given
    else:
        raise UnsupportedFeatureError(
            f"past_key_values is a {type(given).__name__}; a wrapped model continues its own caches only"
        )
    if question_tokens:
        cache.question_tokens = question_tokens
        cache.question_aware = model.longfit.looks_at_questions
    return cache


def _continued(model: Any, memory: Memory, ids: Tensor, mask: Tensor | None, repeats: int) -> FitCache:
    """A copy of a memory's cache for ids [B, T], `repeats` rows for each of theirs."""
    memory.check_question(ids)
    cache, B = memory.fork(fingerprint(model, model.longfit)), ids.shape[0]
    if cache.rows not in (B, 1):
        raise InputError(f"the memory has {cache.rows} rows and the question {B}")
    cache.batch_repeat_interleave(B // cache.rows * repeats)
    if mask is not None and not bool(mask.bool().all()):
        raise InputError("a question to a memory cannot be padded; ask questions of different length one by one")
    return cache


def cache_to_compress(
    model: Any, ids: Tensor, mask: Tensor | None, question: Tensor | None, memory: Memory | None
) -> FitCache:
    """The cache for a call of `compress` with ids [B, T], which knows the `question` [B, Q] that it is chosen by.

    Args:
        model: wrapped.
        mask: [B, T], zeros for left padding.
        memory: what the ids follow.

    Raises:
        InputError, UnsupportedFeatureError, BudgetError, FingerprintError: see `compress` and `Memory.append`.
    """
    context = model.longfit
    if memory is not None:
        cache = memory.grown(model, ids, mask, question)
    else:
        cache = context.new_cache(decoder_of(model), *ids.shape)
    if question is None:
        return cache
    if not context.looks_at_questions:
        names = [step.name for step in (context.prompt, context.encoder, context.method) if step and step.name]
        raise UnsupportedFeatureError(
            f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} not look at the question; compress without it"
        )
    if question.ndim != 2 or question.shape[0] != ids.shape[0] or not question.shape[1]:
        raise InputError(f"question_ids has shape {tuple(question.shape)}; expected [{ids.shape[0]}, tokens]")
    cache.question_tokens, cache.question_aware = question.shape[1], True
    return cache
