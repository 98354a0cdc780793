"""Which models can be wrapped, and why others cannot."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from longfit.attention import NAMES
from longfit.budget import ModelShape
from longfit.cache import layer_types
from longfit.errors import UnsupportedModelError

TESTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "gpt_neox"})
SWITCHING_ROPE = frozenset({"longrope", "dynamic"})


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The stack of layers without the head: what prefill runs."""
    return model.get_decoder()


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Sizes of a loaded model."""
    weights = model.get_memory_footprint(return_buffers=False)
    dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
    return ModelShape.from_config(text_config(model), weights_bytes=int(weights), dtype_bytes=dtype.itemsize)


def check(model: Any) -> None:
    """Refuse by name what longfit cannot wrap correctly.

    Raises:
        UnsupportedModelError: with the reason and what would work.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"longfit wraps a transformers PreTrainedModel, not {type(model).__name__}; "
            "load one with longfit.load(...) or AutoModelForCausalLM"
        )
    name, config = type(model).__name__, text_config(model)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is not a decoder-only causal LM; load it with AutoModelForCausalLM")
    if config is not model.config:
        raise UnsupportedModelError(f"{name} is multimodal; load its text model with AutoModelForCausalLM")
    layer_types(config)
    reasons = {
        "attn_logit_softcapping": "soft-capped attention scores",
        "kv_lora_rank": "latent attention (MLA)",
        "attention_chunk_size": "chunked attention",
    }
    for attribute, reason in reasons.items():
        if getattr(config, attribute, None):
            raise UnsupportedModelError(f"{name} uses {reason}, which longfit does not do yet")
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise UnsupportedModelError(f"{name} has learned attention sinks, which longfit does not do yet")
    if getattr(decoder_of(model), "rotary_emb", None) is None:
        raise UnsupportedModelError(f"{name} has no rotary embedding at the top of its decoder; only RoPE is supported")
    if base_implementation(model) not in NAMES:
        raise UnsupportedModelError(
            f"attn_implementation={base_implementation(model)!r} is not supported; use one of {', '.join(NAMES)}"
        )


def base_implementation(model: PreTrainedModel) -> str:
    """The attention backend that the model uses, or used before it was wrapped."""
    current = model.config._attn_implementation or "eager"
    return {wrapped: base for base, wrapped in NAMES.items()}.get(current, current)


def window_of(config: PreTrainedConfig) -> int:
    """Positions that the model was made for."""
    return int(getattr(config, "max_position_embeddings", 0) or 2**31)


def switching_window(config: PreTrainedConfig) -> int | None:
    """Positions after which the model's RoPE changes its frequencies for all tokens (longrope, dynamic NTK).

    A stream cannot go back to its earlier chunks, so an input must stay below. None where RoPE is fixed.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        if rope.get("rope_type") in SWITCHING_ROPE:
            return int(rope.get("original_max_position_embeddings") or window_of(config))
    return None


@torch.no_grad()
def same_as_base(model: Any, tokens: int = 24) -> float:
    """Largest difference of the logits, relative to their spread, with nothing dropped and chunks of a third.

    For a wrapped model; run when a family is not among the tested ones.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, tokens + 1, device=device)[None] % text_config(model).vocab_size
    with model.disabled():
        expected = model(ids, use_cache=False).logits.float()
    with model.longfit.lossless(tokens // 3):
        given = model(ids, use_cache=True).logits.float()
    return float((given - expected).abs().max() / expected.std().clamp(min=1e-6))
