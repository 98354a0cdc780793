"""The kinds of attention layer that a model has, by its configuration."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from longfit.errors import UnsupportedModelError

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Layer types and the arguments of their cache layers, for a text decoder.

    Raises:
        UnsupportedModelError: a type other than full and sliding attention, by name.
    """
    text = config.get_text_config(decoder=True)
    types, given = get_layer_types_and_kwargs(text)
    # transformers 5.17 gives one mapping for all layers, newer ones a list; only sliding layers look at theirs.
    arguments: list[dict[str, Any]] = [given] * len(types) if isinstance(given, dict) else list(given)
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise UnsupportedModelError(
            f"{text.model_type} has layers of type {', '.join(unknown)}; longfit compresses full_attention layers and "
            "leaves sliding_attention layers as they are, other types are not supported"
        )
    return list(types), arguments
