"""Attention of one query a head to chosen entries: gathered, softmaxed and summed without a copy in between.

The chosen entries of a head are split among programs, so that a single sequence fills the device; each does an online
softmax of its share, and a second kernel puts the shares together. Where the query heads of a key/value head share
their choice, one program serves them all and reads each entry once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.attention.kernels.launch import INTERPRETED, multiprocessors

BLOCK = 32
SHARED_ROWS = 16  # the least rows of a matrix product


def attend_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    stored: tuple[Tensor, Tensor],
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See `naive.attend_slots`. Slots below zero are passed over."""
    B, H, _, D = queries.shape
    G, Dv = keys.shape[1], values.shape[-1]
    chosen, k = slots.shape[1], slots.shape[2]
    heads = H // chosen
    queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    past_keys, past_values = (t if t.stride(-1) == 1 else t.contiguous() for t in stored)
    blocks = triton.cdiv(k, BLOCK)
    splits = max(1, min(blocks, triton.cdiv(2 * multiprocessors(queries.device), B * chosen)))
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))
    out = torch.empty(B, H, 1, Dv, dtype=values.dtype, device=queries.device)
    lse = torch.empty(B, H, 1, dtype=torch.float32, device=queries.device)
    parts = out if splits == 1 else torch.empty(B * H, splits, Dv, dtype=torch.float32, device=queries.device)
    part_lses = lse if splits == 1 else torch.empty(B * H, splits, dtype=torch.float32, device=queries.device)
    dv_pad = max(16, triton.next_power_of_2(Dv))
    _attend_share[B * chosen, splits](
        queries,
        keys,
        values,
        past_keys,
        past_values,
        slots.contiguous(),
        parts,
        part_lses,
        scaling,
        k,
        H,
        G,
        chosen,
        triton.cdiv(blocks, splits),
        past_keys.stride(0),
        past_keys.stride(1),
        past_keys.stride(2),
        past_values.stride(0),
        past_values.stride(1),
        past_values.stride(2),
        HEADS=heads,
        ROWS=1 if heads == 1 else max(SHARED_ROWS, triton.next_power_of_2(heads)),
        D=D,
        D_PAD=max(16, triton.next_power_of_2(D)),
        DV=Dv,
        DV_PAD=dv_pad,
        BLOCK=BLOCK,
        UPCAST=INTERPRETED,
        num_warps=4,
    )
    if splits > 1:
        _combine[B * H,](
            parts, part_lses, out, lse, splits, SPLITS_PAD=triton.next_power_of_2(splits), DV=Dv, DV_PAD=dv_pad
        )
    return out, lse


@triton.jit
def _attend_share(
    queries,
    keys,
    values,
    past_keys,
    past_values,
    slots,
    parts,
    part_lses,
    scaling,
    k,
    H,
    G,
    chosen,
    blocks,
    key_b,
    key_g,
    key_s,
    value_b,
    value_g,
    value_s,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One share of the entries chosen for HEADS query heads; the first share has the heads' own key as well."""
    pair, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b = pair // chosen
    first_head = (pair % chosen) * HEADS
    g = first_head * G // H
    row = tl.arange(0, ROWS)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    heads = b * H + first_head + row
    here = row < HEADS
    q = tl.load(queries + heads[:, None] * D + d[None, :], here[:, None] & (d < D)[None, :], other=0.0)

    # The running softmax; the own key opens it in the first share, and a weight of zero stands for it in the others.
    own = tl.load(keys + (b * G + g) * D + d, d < D, other=0.0).to(tl.float32)
    shown = tl.load(values + (b * G + g) * DV + dv, dv < DV, other=0.0).to(tl.float32)
    opens = split == 0
    highest = tl.where(opens, tl.sum(q.to(tl.float32) * own[None, :], 1) * scaling, float("-inf"))
    weight = tl.where(opens, 1.0, 0.0) + tl.zeros((ROWS,), tl.float32)
    total = weight[:, None] * shown[None, :]

    base_key = past_keys + b * key_b + g * key_g
    base_value = past_values + b * value_b + g * value_g
    for block in range(split * blocks, (split + 1) * blocks):
        n = block * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots + pair * k + n, n < k, other=-1).to(tl.int64)
        real = slot >= 0
        key = tl.load(base_key + slot[:, None] * key_s + d[None, :], real[:, None] & (d < D)[None, :], other=0.0)
        value = tl.load(
            base_value + slot[:, None] * value_s + dv[None, :], real[:, None] & (dv < DV)[None, :], other=0.0
        )
        if ROWS == 1:
            logits = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1)[None, :]
        else:
            logits = _product(q, tl.trans(key), UPCAST)
        logits = tl.where(real[None, :], logits * scaling, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A share without any entry so far has no highest: minus infinity must not meet itself.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(highest - anchor)
        p = tl.exp(logits - anchor[:, None])
        weight = weight * fade + tl.sum(p, 1)
        if ROWS == 1:
            seen = tl.sum(tl.reshape(p, (BLOCK, 1)) * value.to(tl.float32), 0)[None, :]
        else:
            seen = _product(p.to(value.dtype), value, UPCAST)
        total = total * fade[:, None] + seen
        highest = higher

    out = total / tl.where(weight > 0, weight, 1.0)[:, None]
    log_sum_exp = tl.where(weight > 0, highest + tl.log(tl.where(weight > 0, weight, 1.0)), float("-inf"))
    at = heads * splits + split
    tl.store(parts + at[:, None] * DV + dv[None, :], out.to(parts.dtype.element_ty), here[:, None] & (dv < DV)[None, :])
    tl.store(part_lses + at, log_sum_exp, here)


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    """a b, summed in fp32. The interpreter multiplies bfloat16 by its bits, so that there both are widened first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _combine(parts, part_lses, out, lse, splits, SPLITS_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """The shares of one query head as one."""
    head = tl.program_id(0).to(tl.int64)
    split, dv = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    inside = split < splits
    logs = tl.load(part_lses + head * splits + split, inside, other=float("-inf"))
    highest = tl.max(logs, 0)
    weights = tl.exp(logs - highest)
    total = tl.sum(weights, 0)
    at = parts + (head * splits + split[:, None]) * DV + dv[None, :]
    shares = tl.load(at, inside[:, None] & (dv < DV)[None, :], other=0.0)
    result = tl.sum(shares * weights[:, None], 0) / total
    tl.store(out + head * DV + dv, result.to(out.dtype.element_ty), dv < DV)
    tl.store(lse + head, highest + tl.log(total))
