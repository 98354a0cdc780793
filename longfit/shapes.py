"""The numbers of a model that memory depends on, read from its configuration without building it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from longfit.errors import UnsupportedModelError

DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Arrays of [tokens, intermediate] that are alive at once in the family's feed-forward part:
# act(gate), up and their product; one fused gate_up counts twice; a plain two-matrix part has the
# input and the output of its activation.
GATED_MLP, FUSED_GATED_MLP, PLAIN_MLP = 3, 4, 2


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model. Letters as everywhere: L layers, H query heads, G key/value heads,
    E hidden size; all counts are exact integers.

    Attributes:
        model_type: the family, as in the configuration.
        full_layers: layers with full attention, whose stored entries longfit can compress.
        sliding_layers: layers with a sliding window, which stay as the model has them.
        sliding_window: tokens that such a layer sees (0 without any).
        query_heads, kv_heads: H and G.
        key_dim, value_dim: size of one key and one value.
        hidden_size: E.
        intermediate_size: width of the feed-forward part per token (experts per token times their width).
        mlp_arrays: arrays [tokens, intermediate_size] alive at once there.
        expert_copies: copies of the hidden states that routing to experts makes per token (0 if dense).
        fused_projection: queries, keys and values are views of one array (Phi-3, GPT-NeoX).
        vocab_size: rows of the embedding.
        dtype_bytes: bytes of one number of activations, keys and values.
        parameters: the model's parameters, tied ones once; None for a family without a formula.
        weights_bytes: bytes the weights take.
    """

    model_type: str
    full_layers: int
    sliding_layers: int
    sliding_window: int
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    hidden_size: int
    intermediate_size: int
    mlp_arrays: int
    expert_copies: int
    fused_projection: bool
    vocab_size: int
    dtype_bytes: int
    parameters: int | None
    weights_bytes: int

    @property
    def layers(self) -> int:
        """L, all layers."""
        return self.full_layers + self.sliding_layers

    @property
    def entry_kv_bytes(self) -> int:
        """Bytes of the key and the value of one token in one layer, all heads."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype_bytes

    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that a plain cache of one row of `tokens` tokens holds."""
        return self.entry_kv_bytes * (
            self.full_layers * tokens + self.sliding_layers * min(tokens, self.sliding_window)
        )

    def with_dtype(self, dtype_bytes: int) -> "ModelShape":
        """The same model with activations, keys and values of another size (weights unchanged)."""
        return replace(self, dtype_bytes=dtype_bytes)

    @classmethod
    def from_config(
        cls, config: Any, *, weights_bytes: int | None = None, dtype_bytes: int | None = None
    ) -> "ModelShape":
        """Sizes from a transformers configuration or its plain dict.

        Args:
            config: a ``PreTrainedConfig`` (its text decoder is taken) or the content of a ``config.json``.
            weights_bytes: what the weights really take (quantised, say); estimated from the parameter
                count and ``dtype_bytes`` when None.
            dtype_bytes: bytes per number; None takes the configuration's dtype, or 4 if it names none.

        Raises:
            UnsupportedModelError: a size is missing, a layer type is unknown, or the family has no
                parameter formula and ``weights_bytes`` is None.
        """
        fields = _decoder_fields(config)
        model_type = str(fields.get("model_type", "unknown"))
        layer_types = _layer_types(fields, model_type)
        sliding = sum(kind == "sliding_attention" for kind in layer_types)
        query_heads = _need(fields, "num_attention_heads", model_type)
        hidden = _need(fields, "hidden_size", model_type)
        head_dim = fields.get("head_dim") or hidden // query_heads
        experts = _expert_count(fields)
        dense_width = fields.get("intermediate_size") or 4 * hidden
        routed_width = fields.get("num_experts_per_tok", 0) * fields.get("moe_intermediate_size", 0)
        parameters = count_parameters(fields)
        dtype_bytes = dtype_bytes or _config_dtype_bytes(fields)
        if weights_bytes is None:
            if parameters is None:
                raise UnsupportedModelError(
                    f"longfit has no parameter formula for {model_type!r}: give weights_bytes; "
                    f"known families: {', '.join(sorted(_FAMILIES))}"
                )
            weights_bytes = parameters * dtype_bytes
        return cls(
            model_type=model_type,
            full_layers=len(layer_types) - sliding,
            sliding_layers=sliding,
            sliding_window=int(fields.get("sliding_window") or 0) if sliding else 0,
            query_heads=query_heads,
            kv_heads=fields.get("num_key_value_heads") or query_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            hidden_size=hidden,
            intermediate_size=max(routed_width, dense_width if _has_dense_layer(fields) else 0),
            mlp_arrays={"phi3": FUSED_GATED_MLP, "gpt_neox": PLAIN_MLP}.get(
                model_type, FUSED_GATED_MLP if experts else GATED_MLP
            ),
            expert_copies=fields.get("num_experts_per_tok", 0) if experts else 0,
            fused_projection=model_type in ("phi3", "gpt_neox"),
            vocab_size=_need(fields, "vocab_size", model_type),
            dtype_bytes=dtype_bytes,
            parameters=parameters,
            weights_bytes=weights_bytes,
        )


def count_parameters(fields: Mapping[str, Any]) -> int | None:
    """Parameters of the causal language model with these configuration fields, tied embeddings once.

    None for a family without a formula here (tests hold each formula to the built model exactly).
    """
    model_type = fields.get("model_type")
    if model_type not in _FAMILIES:
        return None
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or hidden // heads
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    bias = _FAMILIES[model_type]
    attention_bias = bool(fields.get("attention_bias", model_type == "gpt_neox"))

    attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
    if bias == "qkv" or (bias == "config" and attention_bias):
        attention += q_size + 2 * kv_size
    if bias == "config" and attention_bias:
        attention += hidden
    if model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        attention += 2 * head_dim  # q_norm, k_norm
    norms = {"gemma3_text": 4, "gpt_neox": 4}.get(model_type, 2) * hidden  # LayerNorm: weight and bias
    layers = fields["num_hidden_layers"]
    feed_forward = sum(_feed_forward_parameters(fields, index) for index in range(layers))
    final_norm = (2 if model_type == "gpt_neox" else 1) * hidden
    embeddings = fields["vocab_size"] * hidden * (1 if _is_tied(fields) else 2)
    return layers * (attention + norms) + feed_forward + final_norm + embeddings


# Family -> where its attention has biases: "config" (attention_bias), "qkv" (always, not the output), "none".
_FAMILIES: dict[str, str] = {
    "llama": "config",
    "mistral": "none",
    "qwen2": "qkv",
    "qwen3": "config",
    "qwen3_moe": "config",
    "gemma3_text": "config",
    "phi3": "none",
    "gpt_neox": "config",
}


def _feed_forward_parameters(fields: Mapping[str, Any], layer: int) -> int:
    hidden, width = fields["hidden_size"], fields.get("intermediate_size") or 0
    if fields["model_type"] == "gpt_neox":
        return 2 * hidden * width + width + hidden
    experts = _expert_count(fields)
    if experts and not _is_dense(fields, layer):
        return experts * (3 * hidden * fields["moe_intermediate_size"] + hidden)
    mlp_bias = fields["model_type"] == "llama" and fields.get("mlp_bias", False)
    return 3 * hidden * width + (2 * width + hidden if mlp_bias else 0)


def _expert_count(fields: Mapping[str, Any]) -> int:
    return int(fields.get("num_experts") or fields.get("num_local_experts") or 0)


def _is_dense(fields: Mapping[str, Any], layer: int) -> bool:
    """Qwen3-MoE's rule for a layer without experts."""
    step = fields.get("decoder_sparse_step") or 1
    return layer in (fields.get("mlp_only_layers") or ()) or (layer + 1) % step != 0


def _has_dense_layer(fields: Mapping[str, Any]) -> bool:
    if not _expert_count(fields):
        return True
    return any(_is_dense(fields, layer) for layer in range(fields["num_hidden_layers"]))


def _is_tied(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("tie_word_embeddings", fields["model_type"] == "gemma3_text"))


def _decoder_fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        for name in ("text_config", "decoder"):
            if isinstance(config.get(name), Mapping):
                return dict(config[name])
        return config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    fields = dict(config.to_dict())
    for name in ("dtype", "sliding_window", "layer_types"):  # to_dict may leave out or undo these
        fields[name] = getattr(config, name, None)
    return fields


def _need(fields: Mapping[str, Any], name: str, model_type: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise UnsupportedModelError(f"the configuration of this {model_type!r} model has no {name}")
    return value


def _config_dtype_bytes(fields: Mapping[str, Any]) -> int:
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise UnsupportedModelError(f"unknown dtype {name!r}: give dtype_bytes; known: {known}")
    return DTYPE_BYTES[name]


def _layer_types(fields: Mapping[str, Any], model_type: str) -> list[str]:
    """One type per layer, by the rules of transformers' ``DynamicCache``."""
    count = _need(fields, "num_hidden_layers", model_type)
    kinds = fields.get("layer_types")
    if kinds is None:
        # Qwen's files name a window that is off unless they say so.
        windowed = fields.get("sliding_window") and fields.get("use_sliding_window", not model_type.startswith("qwen"))
        pattern = fields.get("sliding_window_pattern") or (6 if model_type == "gemma3_text" else 0)
        first = fields.get("max_window_layers", 28) if model_type in ("qwen2", "qwen3") else 0
        kinds = [
            "sliding_attention"
            if windowed and i >= first and not (pattern and (i + 1) % pattern == 0)
            else "full_attention"
            for i in range(count)
        ]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != count:
        raise UnsupportedModelError(
            f"{model_type!r} has layer types that longfit cannot plan: {', '.join(unknown) or len(kinds)}; "
            "full_attention and sliding_attention work"
        )
    return list(kinds)
