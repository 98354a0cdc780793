"""The code scan: scores of all keys of a head group from their packed 2-bit codes, read once for all its query heads.

Any function of a 2-bit code is a constant plus weights on three bits, the low one, the high one and both of them:

    f(code) = f(0) + low (f(1) - f(0)) + high (f(2) - f(0)) + low high (f(3) - f(2) - f(1) + f(0))

so that a score, a sum of such functions over the head's D channels, is a constant and a few matrix products of 8-bit
weights with bits, which tensor cores do exactly. The Manhattan distance has weights from -3 to 3, one row a query
head. A query in full precision becomes three digits to the base 128, 21 bits below its largest weight, four rows a
query head (the fourth stays 0). What is left to the ordinary units is to cut bits out of bytes; on a GPU that works on
four bytes at a time, and bits are left at a place above the lowest where the weights can make up for it, which saves
shifts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.attention.kernels.launch import NATIVE, multiprocessors

BLOCK = 128
DIGIT_ROWS = 4
MIN_ROWS, MIN_BYTES = 16, 32  # the smallest 8-bit matrix product


def code_nearness(query_codes: Tensor, codes: Tensor) -> Tensor:
    """See `naive.code_nearness`."""
    rows = max(MIN_ROWS, triton.next_power_of_2(query_codes.shape[2]))
    return _launch(query_codes, codes, (0.0, 0.0, 0.0, 0.0), rows, exact_codes=True)


def code_products(queries: Tensor, codes: Tensor, levels: tuple[float, float, float, float]) -> Tensor:
    """See `naive.code_products`."""
    rows = max(MIN_ROWS, DIGIT_ROWS * triton.next_power_of_2(queries.shape[2]))
    return _launch(queries.float(), codes, levels, rows, exact_codes=False)


def _launch(
    queries: Tensor, codes: Tensor, levels: tuple[float, float, float, float], rows: int, exact_codes: bool
) -> Tensor:
    B, G, S, W = codes.shape
    R = queries.shape[2]
    queries = queries.contiguous()
    codes = codes if codes.stride(-1) == 1 else codes.contiguous()
    scores = torch.empty(B, G, R, S, dtype=torch.float32, device=codes.device)
    # Two programs a multiprocessor: the weights are made once a program, the codes stream past them.
    splits = max(1, min(triton.cdiv(S, BLOCK), triton.cdiv(2 * multiprocessors(codes.device), B * G)))
    l0, l1, l2, l3 = levels
    # The high bit is left one place up, where it counts twice.
    steps = l1 - l0, (l2 - l0) / 2, l3 - l2 - l1 + l0
    _scan[B * G, splits](
        queries,
        codes,
        scores,
        S,
        G,
        codes.stride(0),
        codes.stride(1),
        codes.stride(2),
        triton.cdiv(triton.cdiv(S, BLOCK), splits),
        l0,
        *steps,
        max(abs(step) for step in steps),
        R=R,
        W=W,
        W_PAD=max(MIN_BYTES, triton.next_power_of_2(W)),
        ROWS=rows,
        EXACT_CODES=exact_codes,
        # Levels that are symmetric about their middle, or evenly spaced, need no weight on both bits together.
        BOTH=exact_codes or abs(steps[2]) > 1e-6 * max(abs(steps[0]), abs(steps[1])),
        NATIVE=NATIVE,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return scores


@triton.jit
def _scan(
    queries,
    codes,
    scores,
    S,
    G,
    stride_b,
    stride_g,
    stride_s,
    blocks,
    level_0,
    step_low,
    step_high,
    step_both,
    largest_step,
    R: tl.constexpr,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT_CODES: tl.constexpr,
    BOTH: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DIGITS: tl.constexpr = 1 if EXACT_CODES else 4
    HEADS: tl.constexpr = ROWS // DIGITS
    # Where the low bit of a byte's even and odd codes is left.
    LOW_0: tl.constexpr = 0
    LOW_1: tl.constexpr = 2 if EXACT_CODES else 0
    row = tl.arange(0, ROWS)
    head, digit = row // DIGITS, row % DIGITS
    byte = tl.arange(0, W_PAD)
    there = (head < R)[:, None] & (byte < W)[None, :]

    # The weights [ROWS, W_PAD] of each of a byte's four codes, and what does not depend on the keys.
    if EXACT_CODES:
        scale = tl.full((ROWS,), 0.125, tl.float32)
        packed = tl.load(queries + (pair * R + head[:, None]) * W + byte[None, :], there, other=0).to(tl.int32)
        constant = tl.zeros((ROWS,), tl.int32)
        low_0, high_0, both_0, constant = _distance_weights(packed, there, constant, 0, 0)
        low_1, high_1, both_1, constant = _distance_weights(packed, there, constant, 2, 2)
        low_2, high_2, both_2, constant = _distance_weights(packed, there, constant, 4, 0)
        low_3, high_3, both_3, constant = _distance_weights(packed, there, constant, 6, 2)
        offset = constant.to(tl.float32)
    else:
        start = queries + (pair * R + head[:, None]) * (4 * W) + 4 * byte[None, :]
        q_0 = tl.load(start, there, other=0.0)
        q_1 = tl.load(start + 1, there, other=0.0)
        q_2 = tl.load(start + 2, there, other=0.0)
        q_3 = tl.load(start + 3, there, other=0.0)
        top = tl.maximum(tl.maximum(tl.abs(q_0), tl.abs(q_1)), tl.maximum(tl.abs(q_2), tl.abs(q_3)))
        top = tl.max(top, 1) * largest_step
        per_unit = tl.where(top > 0, 1048576.0 / tl.where(top > 0, top, 1.0), 0.0)
        low_0, high_0, both_0 = _digit_weights(q_0, per_unit, digit, step_low, step_high, step_both)
        low_1, high_1, both_1 = _digit_weights(q_1, per_unit, digit, step_low, step_high, step_both)
        low_2, high_2, both_2 = _digit_weights(q_2, per_unit, digit, step_low, step_high, step_both)
        low_3, high_3, both_3 = _digit_weights(q_3, per_unit, digit, step_low, step_high, step_both)
        place = tl.where(digit == 0, 16384.0, tl.where(digit == 1, 128.0, tl.where(digit == 2, 1.0, 0.0)))
        scale = place * top / 1048576.0
        # Each of a head's rows carries the whole constant; the first one alone may add it.
        offset = tl.where(digit == 0, tl.sum(q_0 + q_1 + q_2 + q_3, 1) * level_0, 0.0)

    lane = tl.arange(0, BLOCK)
    out_head = tl.arange(0, HEADS)
    base = codes + (pair // G) * stride_b + (pair % G) * stride_g
    out = scores + pair * R * S
    for block in range(split * blocks, (split + 1) * blocks):
        key = block * BLOCK + lane
        inside = key < S
        at = base + key[None, :].to(tl.int64) * stride_s + byte[:, None]
        if W == W_PAD:
            x = tl.load(at, inside[None, :], other=0)
        else:
            x = tl.load(at, inside[None, :] & (byte < W)[:, None], other=0)
        total = tl.zeros((ROWS, BLOCK), tl.int32)
        total = tl.dot(low_0, _bit(x, 0, LOW_0, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(low_1, _bit(x, 2, LOW_1, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(low_2, _bit(x, 4, LOW_0, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(low_3, _bit(x, 6, LOW_1, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(high_0, _bit(x, 1, LOW_0 + 1, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(high_1, _bit(x, 3, LOW_1 + 1, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(high_2, _bit(x, 5, LOW_0 + 1, NATIVE), total, out_dtype=tl.int32)
        total = tl.dot(high_3, _bit(x, 7, LOW_1 + 1, NATIVE), total, out_dtype=tl.int32)
        if BOTH:
            total = tl.dot(both_0, _both_bits(x, 0, LOW_0, NATIVE), total, out_dtype=tl.int32)
            total = tl.dot(both_1, _both_bits(x, 2, LOW_1, NATIVE), total, out_dtype=tl.int32)
            total = tl.dot(both_2, _both_bits(x, 4, LOW_0, NATIVE), total, out_dtype=tl.int32)
            total = tl.dot(both_3, _both_bits(x, 6, LOW_1, NATIVE), total, out_dtype=tl.int32)
        result = total.to(tl.float32) * scale[:, None] + offset[:, None]
        # [ROWS, BLOCK] -> [HEADS, BLOCK]
        result = tl.sum(tl.reshape(result, (HEADS, DIGITS, BLOCK)), 1)
        tl.store(out + out_head[:, None].to(tl.int64) * S + key[None, :], result, (out_head < R)[:, None] & inside)


@triton.jit
def _distance_weights(packed, there, constant, SHIFT: tl.constexpr, PLACE: tl.constexpr):
    """Weights of minus |own code - code| on the bits of `code`, for the codes at SHIFT of the query's bytes.

    Eight times the weights, for the low bit at PLACE and the high one above it.
    """
    own = (packed >> SHIFT) & 3
    at_0 = -own
    at_1 = -tl.abs(own - 1)
    at_2 = -tl.abs(own - 2)
    at_3 = own - 3
    low = tl.where(there, (at_1 - at_0) * (8 >> PLACE), 0).to(tl.int8)
    high = tl.where(there, (at_2 - at_0) * (4 >> PLACE), 0).to(tl.int8)
    both = tl.where(there, (at_3 - at_2 - at_1 + at_0) * (8 >> PLACE), 0).to(tl.int8)
    return low, high, both, constant + tl.sum(tl.where(there, at_0, 0), 1)


@triton.jit
def _digit_weights(q, per_unit, digit, step_low, step_high, step_both):
    """Each row's digit of the query's weights on the bits of a code."""
    units = q * per_unit[:, None]
    low = _digit(units * step_low, digit)
    high = _digit(units * step_high, digit)
    both = _digit(units * step_both, digit)
    return low, high, both


@triton.jit
def _digit(x, digit):
    """Digit 0, 1 or 2 (from the largest) of whole numbers to the base 128, with digits from -64 to 64; else 0."""
    n = tl.floor(x + 0.5).to(tl.int32)
    last = ((n + 64) & 127) - 64
    n = (n - last) >> 7
    middle = ((n + 64) & 127) - 64
    first = (n - middle) >> 7
    place = digit[:, None]
    return tl.where(place == 0, first, tl.where(place == 1, middle, tl.where(place == 2, last, 0))).to(tl.int8)


@triton.jit
def _bit(x, BIT: tl.constexpr, PLACE: tl.constexpr, NATIVE: tl.constexpr):
    """One bit of every byte, moved down to PLACE, as int8."""
    DOWN: tl.constexpr = BIT - PLACE
    MASK: tl.constexpr = 0x01010101 << PLACE
    if NATIVE:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {DOWN}; and.b32 $0, t, {MASK}; }}",
            "=r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((x >> DOWN) & (1 << PLACE)).to(tl.int8)


@triton.jit
def _both_bits(x, BIT: tl.constexpr, PLACE: tl.constexpr, NATIVE: tl.constexpr):
    """A bit of every byte multiplied with the one above it, moved down to PLACE, as int8."""
    DOWN: tl.constexpr = BIT - PLACE
    MASK: tl.constexpr = 0x01010101 << PLACE
    if NATIVE:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, 1; and.b32 t, t, $1; shr.b32 t, t, {DOWN}; and.b32 $0, t, {MASK}; }}",
            "=r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (((x & (x >> 1)) >> DOWN) & (1 << PLACE)).to(tl.int8)
