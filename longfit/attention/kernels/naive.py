"""What the kernels compute, in plain torch: slow, short, and what every kernel is checked against.

B batch rows, H query heads, G key/value heads, R = H / G, S stored entries, D head size, W = D / 4 bytes of codes.
"""

import torch
from torch import Tensor

from longfit.cache.side_index import unpack_bits


def code_nearness(query_codes: Tensor, codes: Tensor) -> Tensor:
    """Minus the Manhattan distance between 2-bit codes: higher is nearer.

    Adamas (Yan et al. 2025): the distance between the bucketised query and every bucketised key.

    Args:
        query_codes: [B, G, R, W] uint8, four codes a byte as `pack_bits` packs them.
        codes: [B, G, S, W] uint8.

    Returns:
        [B, G, R, S] fp32, whole numbers from -3 D to 0.
    """
    query, keys = unpack_bits(query_codes).int(), unpack_bits(codes).int()
    return -(query.unsqueeze(3) - keys.unsqueeze(2)).abs().sum(-1).float()


def code_products(queries: Tensor, codes: Tensor, levels: tuple[float, float, float, float]) -> Tensor:
    """Dot products of full queries with keys that are known by 2-bit codes only.

    Args:
        queries: [B, G, R, D], in the codes' basis and scaled per channel.
        codes: [B, G, S, W] uint8.
        levels: the value that each code stands for.

    Returns:
        [B, G, R, S] fp32: the sum over d of queries[d] * levels[code[d]].
    """
    table = torch.tensor(levels, dtype=torch.float32, device=codes.device)
    return torch.matmul(queries.float(), table[unpack_bits(codes).int()].mT)


def select_top(scores: Tensor, k: int) -> Tensor:
    """Places of the k highest scores of each row, the lowest place first where scores are equal.

    Args:
        scores: [..., S]; NaN counts as higher than everything, as in torch.topk.
        k: 1 to S.

    Returns:
        [..., k] int32, ascending.
    """
    scores = scores.float()
    scores = scores.masked_fill(scores.isnan(), torch.nan)  # a GPU sorts NaN with a minus sign last
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values.int()


def attend_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    stored: tuple[Tensor, Tensor],
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a head to the stored entries at `slots` and to its own key.

    Args:
        queries: [B, H, 1, D].
        keys, values: the new token's own, [B, G, 1, D] and [B, G, 1, Dv].
        stored: keys [B, G, S, D] and values [B, G, S, Dv].
        slots: [B, H, k], or [B, G, k] where the query heads of a key/value head share them; int32 or int64.
        scaling: factor of the dot products.

    Returns:
        out [B, H, 1, Dv] and the log-sum-exp [B, H, 1] in fp32.
    """
    B, H = queries.shape[:2]
    G = keys.shape[1]
    out = queries.new_empty(B, H, 1, values.shape[-1])
    lse = torch.empty(B, H, 1, dtype=torch.float32, device=queries.device)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            chosen = slots[b, h * slots.shape[1] // H].long()
            seen = torch.cat([stored[0][b, g, chosen], keys[b, g]]).float()
            shown = torch.cat([stored[1][b, g, chosen], values[b, g]]).float()
            logits = seen @ queries[b, h, 0].float() * scaling
            out[b, h, 0] = (logits.softmax(-1) @ shown).to(out.dtype)
            lse[b, h, 0] = logits.logsumexp(-1)
    return out, lse
