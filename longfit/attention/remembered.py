"""Attention that each entry receives from the queries near it, remembered beside the entry."""

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.cache.products import dot_products

QUERY_BLOCK = 64  # so that a block of weights stays in a core's cache


def received(scene: Scene, log_sum_exp: Tensor, window: int | None, name: str) -> None:
    """Add what the new tokens paid to the score `name` of what is stored, and set that of the new tokens.

    Summed over the queries within `window` tokens (all, if None) and over the query heads of each key/value head.

    Args:
        log_sum_exp: [1, H, Q] over everything that the queries attended to.
    """
    first, device, Q = scene.first, log_sum_exp.device, scene.queries.shape[2]
    new = torch.zeros(scene.keys.shape[:3], device=device)
    for start in range(0, Q, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, Q)
        queries, lse = scene.queries[:, :, start:stop], log_sum_exp[:, :, start:stop]
        asking = torch.arange(first + start, first + stop, device=device)[:, None]
        places = torch.arange(first, first + stop, device=device).expand(1, 1, -1)
        new[:, :, :stop] += _paid(scene, queries, lse, scene.keys[:, :, :stop], places, asking, window)
        if scene.stored_keys is not None and scene.positions is not None and scene.part.store is not None:
            kept = scene.part.store.scores[name]
            kept += _paid(scene, queries, lse, scene.stored_keys, scene.positions, asking, window)
    scene.new_scores[name] = new


def _paid(
    scene: Scene, queries: Tensor, lse: Tensor, keys: Tensor, places: Tensor, asking: Tensor, window: int | None
) -> Tensor:
    """Attention weights of queries [1, H, Q, D] on keys [1, G, S, D], summed over queries and heads: [1, G, S]."""
    G, Q = keys.shape[1], queries.shape[2]
    packed = queries.reshape(1, G, -1, queries.shape[-1])
    logits = dot_products(packed, keys) if Q == 1 else torch.matmul(packed, keys.mT).float()
    weights = logits.mul_(scene.scaling).sub_(lse.reshape(1, G, -1, 1)).exp_().view(1, G, -1, Q, keys.shape[2])
    seen = places.unsqueeze(2) <= asking
    if window is not None:
        seen = seen & (places.unsqueeze(2) > asking - window)
    return weights.mul_(seen.unsqueeze(2)).sum((2, 3))
