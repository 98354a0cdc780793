"""Attention over a piece of the keys, with the log-sum-exp that lets pieces be merged exactly.

For a piece with scores s and values v, `out = softmax(s) v` and `lse = log sum exp s`. Two pieces merge into
`out = w out_1 + (1 - w) out_2` with `w = exp(lse_1 - logaddexp(lse_1, lse_2))` (the identity behind FlashAttention,
Dao et al. 2022, and Ring Attention). So a chunk attends to what is kept without a mask and to itself causally, and no
mask is ever built: on a CPU a masked call costs 1.5 to 2 times an unmasked one.
"""

import torch
from torch import Tensor

from longfit.cache.products import dot_products

QUERY_BLOCK = 1024


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    stored: tuple[Tensor, Tensor] | None,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk to what is stored and, causally, to itself.

    Args:
        queries: [B, H, Q, D].
        keys, values: the chunk's own, [B, G, Q, D] and [B, G, Q, Dv].
        stored: kept keys [B, G, n, D] and values [B, G, n, Dv], all before the chunk; None if there are none.
        scaling: factor of the dot products.
        backend: "sdpa", "eager" or "flash_attention_2".

    Returns:
        out [B, H, Q, Dv] and the log-sum-exp [B, H, Q] in fp32.
    """
    B, H, Q, _ = queries.shape
    G = keys.shape[1]
    if Q == 1:
        return attend_one(queries, keys, values, stored, scaling)
    own, own_lse = piece(queries, repeat(keys, H // G), repeat(values, H // G), True, scaling, backend)
    if stored is None:
        return own, own_lse
    packed = queries.reshape(B, G, H // G * Q, -1)
    past, past_lse = piece(packed, *stored, False, scaling, backend)
    return merge(past.reshape(own.shape), past_lse.reshape(B, H, Q), own, own_lse)


def attend_one(
    queries: Tensor, keys: Tensor, values: Tensor, stored: tuple[Tensor, Tensor] | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same for one query per head [B, H, 1, D]: one softmax over what is stored and the query's own key.

    The query rows of a key/value head are packed into one small matrix product: several times as fast on a CPU as a
    kernel that repeats the keys for each query head.
    """
    B, H, _, D = queries.shape
    G = keys.shape[1]
    packed = queries.reshape(B, G, H // G, D)
    logits = torch.matmul(packed, keys.mT).float()
    if stored is not None:
        logits = torch.cat([dot_products(packed, stored[0]), logits], -1)
    logits *= scaling
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    weights = logits.sub_(log_sum_exp).exp_().to(values.dtype)
    out = weights[..., -1:] * values
    if stored is not None:
        out = torch.matmul(weights[..., :-1], stored[1]).add_(out)
    return out.reshape(B, H, 1, -1), log_sum_exp.reshape(B, H, 1)


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two pieces' outputs [B, H, Q, Dv] and log-sum-exps [B, H, Q] as one."""
    total = torch.logaddexp(first_lse, second_lse)
    weight = (first_lse - total).exp_().unsqueeze(-1)
    return torch.lerp(second, first, weight.to(first.dtype)), total


def piece(
    queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of queries [B, H, Q, D] over keys [B, H, S, D], by the fastest kernel there is.

    `causal` needs Q == S.
    """
    same_size = queries.shape[-1] == values.shape[-1]
    if backend == "flash_attention_2":
        return _flash_attention_2(queries, keys, values, causal, scaling)
    if backend == "sdpa" and same_size and queries.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, scale=scaling
        )
        return out, lse.float()
    if backend == "sdpa" and same_size and queries.is_cuda:
        return _cuda(queries, keys, values, causal, scaling)
    return plain(queries, keys, values, causal, scaling)


def plain(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch, block by block: the reference, and the path of eager attention."""
    outs, lses = [], []
    places = torch.arange(keys.shape[2], device=keys.device)
    for start in range(0, queries.shape[2], QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK]
        logits = torch.matmul(block, keys.mT).float() * scaling
        if causal:
            rows = start + torch.arange(block.shape[2], device=keys.device)
            logits = logits.masked_fill(places[None] > rows[:, None], float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        outs.append(torch.matmul((logits - lse).exp().to(values.dtype), values))
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def plain_masked(
    queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, H, Q, D] over keys [B, H, S, D] where `allowed` (broadcastable to [B, H, Q, S])."""
    logits = (torch.matmul(queries, keys.mT).float() * scaling).masked_fill(~allowed, float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    return torch.matmul((logits - lse).exp().to(values.dtype), values), lse.squeeze(-1)


def repeat(heads: Tensor, times: int) -> Tensor:
    """[B, G, S, D] to [B, G * times, S, D], each key/value head for the query heads that read it."""
    return heads if times == 1 else heads.repeat_interleave(times, 1)


def _cuda(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    D, Q = queries.shape[-1], queries.shape[2]
    if queries.dtype in (torch.float16, torch.bfloat16) and D % 8 == 0 and D <= 256:
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, causal, False, scale=scaling
        )
        return result[0], result[1].float()
    if D % 8 == 0:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, None, True, 0.0, causal, scale=scaling
        )
        return result[0], result[1][..., :Q].float()
    return plain(queries, keys, values, causal, scaling)


def _flash_attention_2(
    queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        softmax_scale=scaling,
        causal=causal,
        return_attn_probs=True,
    )
    return out.transpose(1, 2), lse.float()
