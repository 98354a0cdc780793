"""Top-k selection: each row is cut into chunks, the best of each chunk are chosen, then the k best of those.

Within a chunk, whose scores stay in registers, a threshold is found bit by bit: the scores as whole numbers of the same
order, the largest number that at least k of them reach. A round that is not the last needs no exact threshold and stops
as soon as no more than 2 k scores reach it, most often within a dozen of the 32 bits. Nothing is sorted and nothing but
the winners is written. Exact; the lowest place wins between equal scores, in every run, since winners keep their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192
SHRINK = 8  # a chunk is this many times k at least, or torch.topk is the better way


def suits(S: int, k: int) -> bool:
    """Whether the rounds shrink fast enough for rows of S scores."""
    return S <= CHUNK or k * SHRINK <= CHUNK


def select_top(scores: Tensor, k: int) -> Tensor:
    """See `naive.select_top`; only where `suits`."""
    rows = scores.reshape(-1, scores.shape[-1]).float().contiguous()
    places: Tensor | None = None
    while True:
        N, S = rows.shape
        chunks = triton.cdiv(S, CHUNK)
        most = k if chunks == 1 else 2 * k
        best = torch.empty(N, chunks * most, dtype=torch.float32, device=rows.device)
        chosen = torch.empty(N, chunks * most, dtype=torch.int32, device=rows.device)
        block = max(16, triton.next_power_of_2(min(S, CHUNK)))
        _best_of_chunk[N, chunks](
            rows,
            rows if places is None else places,
            best,
            chosen,
            S,
            k,
            most,
            FIRST=places is None,
            BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
        )
        if chunks == 1:
            return chosen.view(*scores.shape[:-1], k)
        rows, places = best, chosen


@triton.jit
def _best_of_chunk(scores, places, best, chosen, S, k, most, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The best of one chunk, k at least and `most` at most, and where they stand in the row; -1 fills up the rest."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offset < S
    x = tl.load(scores + row * S + offset, inside, other=0.0)
    place = offset if FIRST else tl.load(places + row * S + offset, inside, other=-1)
    valid = inside & (place >= 0)

    # Floats as unsigned numbers of the same order; both zeros alike, every NaN above infinity.
    x = tl.where(x == 0.0, 0.0, x)
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    order = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)

    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    count = tl.sum(valid.to(tl.int32))
    while (bit != 0) & (count > most):
        higher = threshold | bit
        reached = tl.sum((valid & (order >= higher)).to(tl.int32))
        threshold = tl.where(reached >= k, higher, threshold)
        count = tl.where(reached >= k, reached, count)
        bit = bit >> 1

    above = valid & (order > threshold)
    equal = valid & (order == threshold)
    room = most - tl.sum(above.to(tl.int32))
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    rank = tl.cumsum(taken.to(tl.int32), 0) - 1
    out = (row * tl.num_programs(1) + chunk) * most
    tl.store(best + out + rank, x, taken)
    tl.store(chosen + out + rank, place, taken)
    slot = tl.arange(0, BLOCK)
    empty = (slot >= tl.sum(taken.to(tl.int32))) & (slot < most)
    tl.store(best + out + slot, 0.0, empty)
    tl.store(chosen + out + slot, -1, empty)
