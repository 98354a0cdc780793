"""Bytes that are alive while one chunk of prefill passes through one decoder layer, term by term.

Nothing here depends on the input's length: that is what streaming prefill buys. The terms follow the
order of a decoder layer; those of its phases exclude each other, so the peak is the part that lives
through all of them plus the largest phase. docs/memory.md compares the sum with what was measured.
"""

from longfit.shapes import ModelShape

FP32 = 4
INT64 = 8


def working_set_terms(
    shape: ModelShape,
    *,
    chunk_tokens: int,
    kept_tokens: int,
    batch_size: int = 1,
    entry_state_bytes: int = 0,
    score_workspace_bytes: int = 0,
    trims: bool = True,
    packed: bool = False,
) -> dict[str, int]:
    """Named bytes of the largest moment of one chunk; their sum is the working set.

    Args:
        shape: the model.
        chunk_tokens: C, tokens of the chunk per row.
        kept_tokens: N, entries a compressible layer holds before the chunk.
        batch_size: B.
        entry_state_bytes: bytes a method keeps per key/value head and entry beside key, value, position.
        score_workspace_bytes: what scoring one layer allocates at once (all rows).
        trims: False when everything is kept, so that a layer is only ever filled in place.
        packed: positions are packed, so that kept keys are rotated to where they stand for every chunk.
    """
    phases = [
        attention_terms(shape, chunk_tokens, kept_tokens, batch_size, packed),
        feed_forward_terms(shape, chunk_tokens, batch_size),
        logits_terms(shape, chunk_tokens, batch_size),
    ]
    if trims and shape.full_layers:
        terms = trim_terms(
            shape, chunk_tokens, kept_tokens, batch_size, entry_state_bytes, score_workspace_bytes, packed
        )
        phases.append(terms)
    largest = max(phases, key=lambda terms: sum(terms.values()))
    return {**resident_terms(shape, chunk_tokens, batch_size), **largest}


def resident_terms(shape: ModelShape, chunk_tokens: int, batch_size: int) -> dict[str, int]:
    """What lives through the whole chunk: token ids, rotary tables and three arrays of hidden states.

    The model holds the embedded chunk to its end, each layer's caller holds the layer's input, and the
    stream holds the output of the chunk before until the next one replaces it.
    """
    tokens = batch_size * chunk_tokens
    hidden = tokens * shape.hidden_size * shape.dtype_bytes
    hybrid = shape.full_layers > 0 and shape.sliding_layers > 0
    mask = tokens * (shape.sliding_window + chunk_tokens) if shape.sliding_layers else 0
    return {
        "token ids and positions": 3 * tokens * INT64,
        "rotary tables": (1 + hybrid) * 2 * tokens * shape.key_dim * shape.dtype_bytes,
        **({"mask of sliding layers": mask} if mask else {}),
        "embedded chunk": hidden,
        "layer input": hidden,
        "output of the chunk before": hidden,
    }


def attention_terms(
    shape: ModelShape, chunk_tokens: int, kept_tokens: int, batch_size: int, packed: bool
) -> dict[str, int]:
    """RoPE's temporaries, or the merge of attention to the kept entries with that to the chunk.

    With packed positions the kept keys of the layer are rotated first, in fp32.
    """
    tokens = batch_size * chunk_tokens
    queries, _, output = _attention_arrays(shape, tokens)
    kept = batch_size * kept_tokens * shape.kv_heads if shape.full_layers else 0
    keys = kept * shape.key_dim if packed else 0
    log_sum_exp = tokens * shape.query_heads * FP32
    parts = {
        "rotation of the chunk": 3 * queries,  # q cos, rotated half, rotated half sin
        "merge of two attentions": queries + 3 * output + 5 * log_sum_exp + keys * shape.dtype_bytes,
        # cos, sin, one side's result, the other's products and half turn; half-precision keys in fp32.
        "rotation of kept keys": (6 if shape.dtype_bytes == FP32 else 7) * keys * FP32,
    }
    if shape.dtype_bytes < FP32:  # the CPU kernel of half precision lays keys and values out anew
        copies = (keys + kept * (shape.key_dim + shape.value_dim)) * shape.dtype_bytes
        parts["attention to kept, and its copies"] = queries + 2 * output + copies
    name, largest = max(parts.items(), key=lambda part: part[1])
    return {**_held_by_attention(shape, tokens), name: largest}


def trim_terms(
    shape: ModelShape,
    chunk_tokens: int,
    kept_tokens: int,
    batch_size: int,
    entry_state_bytes: int,
    score_workspace_bytes: int,
    packed: bool,
) -> dict[str, int]:
    """One layer while it is trimmed: candidates, then scoring or the new buffer, beside the old buffer."""
    tokens = batch_size * chunk_tokens
    output = _attention_arrays(shape, tokens)[2]
    entry = entry_bytes(shape, entry_state_bytes)
    indices = 2 * batch_size * shape.kv_heads * kept_tokens * INT64
    new_buffer = batch_size * kept_tokens * entry + indices
    scoring = score_workspace_bytes > new_buffer
    # With packed positions: kept keys and the chunk's keys as rotated, and both joined for the method to see.
    keys = 2 * (batch_size * kept_tokens + tokens) * shape.kv_heads * shape.key_dim * shape.dtype_bytes
    return {
        **_held_by_attention(shape, tokens),
        "attention output": output + tokens * shape.query_heads * FP32,
        "candidates of one layer": (batch_size * kept_tokens + tokens) * entry,
        **({"rotated keys": keys} if packed else {}),
        "scoring" if scoring else "new buffer of one layer": max(score_workspace_bytes, new_buffer),
    }


def feed_forward_terms(shape: ModelShape, chunk_tokens: int, batch_size: int) -> dict[str, int]:
    """Activations of the feed-forward part, its normed input and the residual."""
    tokens = batch_size * chunk_tokens
    hidden = tokens * shape.hidden_size * shape.dtype_bytes
    return {
        "residual": hidden,
        "normed chunk": hidden,
        "feed-forward activations": shape.mlp_arrays * tokens * shape.intermediate_size * shape.dtype_bytes,
        "routed copies": 2 * shape.expert_copies * hidden,
    }


def logits_terms(shape: ModelShape, chunk_tokens: int, batch_size: int) -> dict[str, int]:
    """Logits of one token per row, with the fp32 copies that sampling makes, behind the last chunk."""
    return {
        "normed chunk": batch_size * chunk_tokens * shape.hidden_size * shape.dtype_bytes,
        "logits": batch_size * shape.vocab_size * (shape.dtype_bytes + 3 * FP32),
    }


def entry_bytes(shape: ModelShape, entry_state_bytes: int = 0) -> int:
    """Bytes of one kept token in one compressible layer, all heads: keys, values, int32 position, state."""
    numbers = (shape.key_dim + shape.value_dim) * shape.dtype_bytes
    return shape.kv_heads * (numbers + 4 + entry_state_bytes)


def _held_by_attention(shape: ModelShape, tokens: int) -> dict[str, int]:
    """The input of the attention, and queries, keys and values (with what a fused projection keeps alive)."""
    queries, chunk, _ = _attention_arrays(shape, tokens)
    keys = tokens * shape.kv_heads * shape.key_dim * shape.dtype_bytes
    return {
        "normed chunk": tokens * shape.hidden_size * shape.dtype_bytes,
        "queries, keys, values": queries + chunk + (queries + keys if shape.fused_projection else 0),
    }


def _attention_arrays(shape: ModelShape, tokens: int) -> tuple[int, int, int]:
    """Bytes of the queries, of the chunk's keys and values, and of one attention output."""
    queries = tokens * shape.query_heads * shape.key_dim * shape.dtype_bytes
    chunk = tokens * shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype_bytes
    return queries, chunk, tokens * shape.query_heads * shape.value_dim * shape.dtype_bytes
