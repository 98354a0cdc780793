"""What a call of `generate` or `forward` asks for, and what of it cannot be had."""

from typing import Any

from torch import Tensor

from longfit.errors import InputError, UnsupportedFeatureError
from longfit.padding import left_padding

REFUSED_ARGUMENTS = {
    "assistant_model": "assisted decoding rolls the cache back",
    "prompt_lookup_num_tokens": "prompt lookup rolls the cache back",
    "cache_implementation": "the wrapper brings its own cache",
    "prefill_chunk_size": "the wrapper cuts the prefill itself; set chunk_tokens in wrap()",
    "inputs_embeds": "generate() takes token ids; forward() takes embeddings",
}


def setting(model: Any, kwargs: dict[str, Any], name: str) -> int:
    """A number of the generation configuration that a call of `generate` would use."""
    for source in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
        if source is not None:
            return int(source)
    own = getattr(model.generation_config, name, None)
    return int(own) if own is not None else (20 if name == "max_new_tokens" else 1)


def prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The token ids [B, T] of a call of `generate`.

    Raises:
        InputError: none, or not token ids, or padding that is not on the left.
    """
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if ids is None:
        raise InputError("generate() needs input_ids")
    check_ids(ids)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        left_padding(mask)
    return ids


def check_ids(ids: Any) -> None:
    """
    Raises:
        InputError: not a tensor of token ids [B, T], or one without a token.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("input_ids have to be a tensor of token ids [B, T]; use tokenizer(text, return_tensors='pt')")
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise InputError(f"the input is empty: input_ids has shape {tuple(ids.shape)}; give at least one token")


def refuse(model: Any, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        UnsupportedFeatureError: the call or the generation configuration has an argument that no compressor works with.
    """
    config = kwargs.get("generation_config") or model.generation_config
    for name, reason in REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None or getattr(config, name, None) is not None:
            raise UnsupportedFeatureError(f"{name} does not work with a compressor: {reason}")
    if kwargs.get("use_cache") is False:
        raise UnsupportedFeatureError("use_cache=False leaves nothing to compress; use `model.disabled()`")


def tokens_of(arguments: dict[str, Any]) -> tuple[Tensor, str]:
    """The tokens of a forward, as ids [B, T] or embeddings [B, T, E], and the argument that holds them.

    Raises:
        InputError: none or both were given, or there is no token.
    """
    names = [n for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None]
    if len(names) != 1:
        raise InputError("give either input_ids or inputs_embeds")
    tokens = arguments[names[0]]
    if tokens.ndim < 2 or tokens.shape[1] == 0:
        raise InputError(f"the input is empty: {names[0]} has shape {tuple(tokens.shape)}; give at least one token")
    return tokens, names[0]


def take_tokens(arguments: dict[str, Any]) -> tuple[Tensor, str]:
    """The same, taken out of the arguments, for a stream of chunks.

    Raises:
        InputError: see `tokens_of`.
        UnsupportedFeatureError: something was asked for that a stream of chunks does not give.
    """
    for feature in ("output_attentions", "output_hidden_states"):
        if arguments.get(feature):
            raise UnsupportedFeatureError(f"{feature} is not available with a compressor; use `model.disabled()`")
    tokens, name = tokens_of(arguments)
    arguments.pop("input_ids", None)
    arguments.pop("inputs_embeds", None)
    return tokens, name
