"""Tiny models of every tested family, built in code with weights large enough that attention is not uniform."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"head_dim": 8}),
    "llama_scaled": ("llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "llama_yarn": ("llama", {"head_dim": 8, "rope_parameters": YARN}),
    "llama_mqa": ("llama", {"head_dim": 8, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 6}),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes) -> PreTrainedModel:
    """A seeded model of the family, in eval mode."""
    model_type, own = FAMILIES[family]
    torch.manual_seed(11)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **own, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, weight in model.named_parameters():
        if "_norm" in name:  # unit weights would give every normalised key the same length, and knorm nothing but ties
            weight.data += torch.randn_like(weight) * 0.5
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()
