"""Attention that the tokens of a chunk receive from the queries of the same chunk."""

import torch
from torch import Tensor

QUERY_BLOCK = 256


def received_mass(queries: Tensor, keys: Tensor, lse: Tensor, window_tokens: int, scaling: float) -> Tensor:
    """Attention within a causal window, summed over queries and over the query heads of each key/value head.

    Args:
        queries: [B, H, Q, D]; keys: the same tokens' [B, G, Q, D].
        lse: [B, H, Q] log-sum-exp of all that the queries attended to, in this chunk and before.
        window_tokens: keys that a query sees, its own included.
        scaling: factor of the dot products.

    Returns:
        [B, G, Q] in fp32.
    """
    B, H, Q, D = queries.shape
    G = keys.shape[1]
    mass = torch.zeros(B, G, Q, dtype=torch.float32, device=queries.device)
    for start in range(0, Q, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, Q)
        oldest = max(0, start - window_tokens + 1)
        packed = queries[:, :, start:stop].reshape(B, G, -1, D)
        logits = torch.matmul(packed, keys[:, :, oldest:stop].mT).float().mul_(scaling)
        logits.sub_(lse[:, :, start:stop].reshape(B, G, -1, 1))
        asking = torch.arange(start, stop, device=mass.device)[:, None]
        places = torch.arange(oldest, stop, device=mass.device)
        hidden = (places > asking) | (places <= asking - window_tokens)
        weights = logits.view(B, G, H // G, stop - start, -1).masked_fill_(hidden, float("-inf")).exp_()
        mass[:, :, oldest:stop] += weights.sum((2, 3))
    return mass
