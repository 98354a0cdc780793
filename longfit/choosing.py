"""From what a user names to the objects that `wrap` works with: compressors, pipelines and attention patches."""

import copy
from typing import Any

from longfit import attention as attentions
from longfit.attention import AttentionPatch
from longfit.cache import FULL, layer_types
from longfit.compressors import KeepAll, KVCompressor, LearnedCompressor, PromptCompressor, get
from longfit.errors import InputError, UnsupportedFeatureError, UnsupportedModelError
from longfit.families import text_config


def compressors_of(
    compressor: Any, options: dict[str, Any]
) -> tuple[PromptCompressor | None, LearnedCompressor | None, KVCompressor]:
    """What shortens the prompt and what makes a memory of the context, if anything, and what trims the cache.

    They are copies, to be bound to one model.

    Raises:
        InputError, UnknownNameError: not a compressor.
        UnsupportedFeatureError: a pipeline in an order that does not work.
    """
    steps = compressor if isinstance(compressor, list) else [] if compressor is None else [compressor]
    made = [copy.copy(_compressor(step, options if len(steps) == 1 else {})) for step in steps]
    if len(steps) > 1 and options:
        raise InputError(f"options {', '.join(options)} go to the compressor objects of a pipeline")
    prompts = [step for step in made if isinstance(step, PromptCompressor)]
    learned = [step for step in made if isinstance(step, LearnedCompressor)]
    trims = [step for step in made if isinstance(step, KVCompressor)]
    ordered = [*prompts, *learned, *trims]
    if (
        len(prompts) > 1
        or len(learned) > 1
        or len(trims) > 1
        or any(a is not b for a, b in zip(made, ordered, strict=True))
    ):
        raise UnsupportedFeatureError(
            "a pipeline is one prompt compressor, then one learned compressor, then one that trims the cache, each of "
            "them or not, such as ['sentinel', 'snapkv'] or ['strided_kv', 'snapkv']"
        )
    method = trims[0] if trims else KeepAll()
    if learned and method.replays:
        raise UnsupportedFeatureError(f"{method.name} reads the context again, which a learned memory has not kept")
    return (prompts[0] if prompts else None), (learned[0] if learned else None), method


def _compressor(compressor: Any, options: dict[str, Any]) -> Any:
    kinds = (KVCompressor, LearnedCompressor, PromptCompressor)
    if isinstance(compressor, str):
        return get(compressor, **options)
    if isinstance(compressor, type) and issubclass(compressor, kinds):
        return compressor(**options)
    if not isinstance(compressor, kinds):
        raise InputError(f"a compressor is a name or a compressor object, not {type(compressor).__name__}")
    if options:
        raise InputError(f"options {', '.join(options)} go to the compressor object itself")
    return compressor


def patch_of(attention: str | AttentionPatch, options: dict[str, Any]) -> AttentionPatch:
    if isinstance(attention, str):
        return attentions.get(attention, **options)
    if not isinstance(attention, AttentionPatch):
        raise InputError(f"an attention is a name or an AttentionPatch, not {type(attention).__name__}")
    if options:
        raise InputError(f"options {', '.join(options)} go to the attention object itself")
    return attention


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
