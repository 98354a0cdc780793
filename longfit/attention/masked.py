"""Attention under a mask that is written down for a block of queries and the keys in its sight, never for the input."""

import torch
from torch import Tensor

from longfit.attention.partial import plain_masked, repeat


def attend_masked(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention where `allowed`.

    Args:
        queries: [B, H, Q, D]; keys, values: [B, G, S, D] and [B, G, S, Dv].
        allowed: bool, broadcastable to [B, H, Q, S]; every query needs one key at least.

    Returns:
        out [B, H, Q, Dv] and log-sum-exp [B, H, Q] in fp32.
    """
    H, G = queries.shape[1], keys.shape[1]
    keys, values = repeat(keys, H // G), repeat(values, H // G)
    same_size = queries.shape[-1] == values.shape[-1]
    if backend == "sdpa" and same_size and queries.device.type == "cpu":
        bias = torch.zeros(allowed.shape, dtype=queries.dtype).masked_fill_(~allowed, float("-inf"))
        bias = bias.expand(*([1] * (4 - bias.ndim)), *bias.shape) if bias.ndim < 4 else bias
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=bias, scale=scaling
        )
        return out, lse.float()
    return plain_masked(queries, keys, values, allowed, scaling)
