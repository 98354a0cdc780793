"""What an input would cost under a budget, from a model's configuration alone: the wrapper's arithmetic, no weights."""

import json
from pathlib import Path
from typing import Any

from longfit.budget import MemoryBudget, ModelShape, Plan, parse_tokens
from longfit.compressors import KeepAll, KVCompressor, LearnedCompressor, PromptCompressor
from longfit.context import ANY_LENGTH, FitContext
from longfit.errors import InputError, LoadError
from longfit.families import window_of
from longfit.shapes import count_parameters


def planned(
    model: str,
    tokens: int | str,
    method: KVCompressor | LearnedCompressor | PromptCompressor,
    *,
    budget: MemoryBudget | None,
    batch_size: int = 1,
    chunk_tokens: int | None = None,
    dtype: str = "auto",
) -> Plan:
    """What `wrap` and `generate` would keep and spend for rows of `tokens` tokens.

    Args:
        model: as for `longfit.load`; a packaged model that is not in the cache folder yet is fetched first.
        tokens: input tokens of a row, also as "120k".
        budget: None for a learned or prompt compressor at its own ratio.
        dtype: as for `longfit.load`.

    Raises:
        BudgetError: the budget cannot be met; the message has the smallest that would do.
        LoadError, UnsupportedModelError, InputError: the model or a number cannot be used.
    """
    tokens = parse_tokens(tokens)
    if batch_size < 1 or (chunk_tokens is not None and chunk_tokens < 1):
        raise InputError(f"batch {batch_size} and chunk_tokens {chunk_tokens} have to be at least 1")
    config = configuration(model)
    encoder = method if isinstance(method, LearnedCompressor) else None
    if encoder is not None and budget is None:
        raw = min(tokens, encoder.window_tokens)
        slots = encoder.slots_for(tokens - raw) if tokens > raw else 0
        budget = MemoryBudget(kept_tokens=slots + raw)
    prompt = method if isinstance(method, PromptCompressor) else None
    if prompt is not None and budget is None:
        budget = MemoryBudget(kept_tokens=prompt.own_target(tokens))
    if budget is None:
        raise InputError("a compressor that prunes needs a budget, such as 64MiB or 25%")
    context = FitContext(
        method=KeepAll() if isinstance(method, LearnedCompressor | PromptCompressor) else method,
        encoder=encoder,
        prompt=prompt,
        budget=budget,
        shape=shape_of(config, dtype),
        config=config,
        chunk_tokens=chunk_tokens,
        geometry=None,
        base_implementation="sdpa",
    )
    packed = (
        encoder.packs
        if encoder is not None
        else context.method.geometry == "packed" or (prompt is None and tokens > window_of(config))
    )
    if context.budget.keep_ratio is None:
        # The wrapper settles the chunk before it knows where an input ends.
        context.chunk_tokens = context.plan(batch_size, ANY_LENGTH, packed).chunk_tokens
    return context.plan(batch_size, tokens, packed)


def configuration(model: str) -> Any:
    """The configuration of the text decoder that `longfit.load(model)` would build, weights left alone.

    Raises:
        LoadError: nothing of that name, or no configuration in it.
    """
    from transformers import AutoConfig

    from longfit.loading import explain, resolve_name
    from longfit.packaged import model_folder

    kind, place = resolve_name(model)
    given: dict[str, Any] = {}
    if kind == "packaged":
        place = str(model_folder(place))
    elif kind == "gguf":
        place, given = str(Path(place).parent), {"gguf_file": Path(place).name}
    elif kind == "folder" and not (Path(place) / "config.json").is_file():
        adapter = json.loads((Path(place) / "adapter_config.json").read_text(encoding="utf-8"))
        return configuration(adapter.get("base_model_name_or_path") or "")
    try:
        config = AutoConfig.from_pretrained(place, **given)
    except Exception as error:
        raise LoadError(explain(place, error)) from error
    return config.get_text_config(decoder=True)


def shape_of(config: Any, dtype: str) -> ModelShape:
    """Sizes of the model in the dtype that `longfit.load(dtype=...)` would choose on this machine."""
    from longfit.loading import pick_device, resolve_dtype

    dtype_bytes = resolve_dtype(dtype, pick_device("auto")).itemsize
    weights_bytes = None
    if count_parameters(config.to_dict()) is None:
        weights_bytes = dtype_bytes * _parameters(config)
    return ModelShape.from_config(config, weights_bytes=weights_bytes, dtype_bytes=dtype_bytes)


def _parameters(config: Any) -> int:
    """Parameters of a family without a formula, from the model built without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
