"""A further piece of an attention: keys that not every query sees, merged with the rest by `partial.merge`."""

import torch
from torch import Tensor

from longfit.attention.partial import repeat

QUERY_BLOCK = 256


def attend_some(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention where `allowed`; a query that sees none of the keys gets zeros and a log-sum-exp of minus infinity,
    which `merge` leaves out.

    Args:
        queries: [B, H, Q, D]; keys, values: [B, G, S, D] and [B, G, S, Dv].
        allowed: bool, broadcastable to [B, G, Q, S] or [B, H, Q, S].
        scaling: factor of the dot products.

    Returns:
        out [B, H, Q, Dv] and log-sum-exp [B, H, Q] in fp32.
    """
    H, G, Q = queries.shape[1], keys.shape[1], queries.shape[2]
    keys, values = repeat(keys, H // G), repeat(values, H // G)
    allowed = allowed.expand(*allowed.shape[:2], Q, keys.shape[2])
    if allowed.shape[1] not in (1, H):
        allowed = allowed.repeat_interleave(H // G, 1)
    outs, lses = [], []
    for start in range(0, Q, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        logits = torch.matmul(queries[:, :, block], keys.mT).float().mul_(scaling)
        logits.masked_fill_(~allowed[:, :, block], float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        weights = logits.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_()
        outs.append(torch.matmul(weights.to(values.dtype), values))
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)
