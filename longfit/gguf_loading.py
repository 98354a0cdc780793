"""GGUF files as ordinary models, without the two things that transformers loses on the way.

transformers de-quantises the weights but (1) leaves a quantisation marker behind, with which the model can
neither be saved nor moved to another dtype, and (2) ignores scaled rotary embeddings: llama.cpp keeps
Llama 3's scaling as a tensor of frequency divisors (`rope_freqs.weight`) and the others as `rope.scaling.*`
metadata, and both are dropped, so that the model is right on short inputs and wrong on long ones. Here a
scaling that can be told apart exactly is applied; any other is an error that names the remedy.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.integrations.gguf import read_gguf_metadata

from longfit.errors import LoadError

# Llama 3.1, 3.2 and 3.3 differ in the factor alone (their config.json); the factor is read from the tensor.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_WINDOW = 1.0, 4.0, 8192


def load_gguf(
    path: Path,
    *,
    dtype: torch.dtype,
    rope_parameters: Mapping[str, Any] | None = None,
    progress: bool = True,
    **model_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the GGUF file at `path` into a plain model of `dtype`, and its tokenizer.

    `rope_parameters` overrides the rotary settings of the file (the keys of transformers' config, e.g.
    `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`); `{"rope_type":
    "default"}` states that there is no scaling. `model_options` go to `from_pretrained`.
    Raises `LoadError` for a file that is not GGUF, that transformers cannot read, whose weights do not
    cover the model, or whose rotary scaling is unknown.
    """
    fields, rope_divisors = read_rope_facts(path)
    folder, file = str(path.parent), path.name
    # transformers draws bars of its own for GGUF files, which no setting of it hides.
    quiet = nullcontext() if progress else redirect_stderr(io.StringIO())
    try:
        with quiet:
            config = AutoConfig.from_pretrained(folder, gguf_file=file)
            apply_rope_scaling(config, fields, rope_divisors, rope_parameters)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                config=config,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **model_options,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except LoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones
        raise LoadError(f"transformers cannot read the GGUF file {path}: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise LoadError(f"{path} holds no weights for {', '.join(missing[:5])} ({len(missing)} in all)")
    drop_quantisation_marker(model)
    return model, plain_tokenizer(tokenizer, fields)


def drop_quantisation_marker(model: PreTrainedModel) -> None:
    """Make a de-quantised model an ordinary one again, which can be saved, cast and trained."""
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.config.__dict__.pop("quantization_config", None)
    for marker in ("quantization_method", "is_quantized"):
        model.__dict__.pop(marker, None)


def read_rope_facts(path: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a GGUF file says about positions: its metadata (of text arrays only their length), and the
    divisors [D/2] of the rotary frequencies if it holds them. Raises `LoadError` when it is no readable
    GGUF file."""
    try:
        fields, tensors = read_gguf_metadata(str(path))
        if "rope_freqs.weight" not in tensors:
            return fields, None
        # Reads the vocabulary in Python, which takes seconds: only for the files that need it.
        found = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
        return fields, np.array(found.data, dtype=np.float64)
    except (ValueError, IndexError, OSError, struct.error) as error:
        raise LoadError(f"{path} is not a readable GGUF file: {error}") from error


def apply_rope_scaling(
    config: PreTrainedConfig,
    fields: Mapping[str, Any],
    divisors: np.ndarray | None,
    override: Mapping[str, Any] | None,
) -> None:
    """Put the rotary scaling of a GGUF file into `config`, or raise `LoadError` if it cannot be known."""
    architecture = fields.get("general.architecture", "")
    scaling = {
        name.removeprefix(f"{architecture}.rope.scaling."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.rope.scaling.")
    }
    if override is not None:
        _set_rope(config, dict(override))
        return
    kind = scaling.get("type", "none" if "factor" not in scaling else "linear")
    if divisors is not None:
        found = llama3_scaling(divisors, _rope_theta(config))
        if found is None or kind != "none":
            raise _unknown_scaling("frequency divisors in rope_freqs.weight that are not Llama 3's")
        _set_rope(config, found)
    elif kind == "linear":
        _set_rope(config, {"rope_type": "linear", "factor": float(scaling["factor"])})
    elif kind != "none" and not _already_read(config, kind):
        raise _unknown_scaling(f"rope.scaling metadata {scaling}")


def llama3_scaling(divisors: np.ndarray, rope_theta: float) -> dict[str, Any] | None:
    """The rotary parameters of which `divisors` [D/2] are the result, or None if they are not Llama 3's.

    The formula is that of `_compute_llama3_parameters` in transformers, inverted by trial: the factor is the
    divisor of the lowest frequency.
    """
    factor = float(divisors.max())
    half = len(divisors)
    wavelength = 2 * math.pi * rope_theta ** (np.arange(half) / half)
    smooth = np.clip((LLAMA3_WINDOW / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_WINDOW,
    }


def _rope_theta(config: PreTrainedConfig) -> float:
    return float(config.rope_parameters.get("rope_theta", 10000.0))


def _set_rope(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    parameters = config.rope_parameters
    # Hybrid models hold one entry a layer type; only their full-attention layers are ever scaled.
    if "full_attention" in parameters:
        config.rope_parameters = {**parameters, "full_attention": {**parameters["full_attention"], **values}}
    else:
        config.rope_parameters = {**parameters, **values}


def _already_read(config: PreTrainedConfig, kind: str) -> bool:
    # transformers reads the scaling of some architectures (gpt-oss) itself.
    return config.rope_parameters.get("rope_type") == kind


def _unknown_scaling(what: str) -> LoadError:
    return LoadError(
        f"this GGUF file scales its rotary positions ({what}), and transformers would drop that "
        "silently: long inputs would come out wrong. Pass the `rope_parameters` of the model's "
        'config.json, e.g. load(path, rope_parameters={"rope_type": "yarn", "factor": 4.0, '
        '"original_max_position_embeddings": 32768}), or {"rope_type": "default"} to run it unscaled.'
    )


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer as one that loads from its own file alone, cutting text as the model was trained to."""
    backend = tokenizer.backend_tokenizer
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers leaves out the splitting of digits (llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM), which
        # decides how the white space before a number is cut.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    plain = TokenizersBackend(
        tokenizer_object=backend,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
    plain.chat_template = tokenizer.chat_template
    return plain
