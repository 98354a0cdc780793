"""Spans of text whose tokens look at each other: triangles along the diagonal of the attention map."""

import torch
from torch import Tensor

QUERY_BLOCK = 64


def band(queries: Tensor, keys: Tensor, log_sum_exp: Tensor, scaling: float, width: int) -> Tensor:
    """Mean attention of each token on itself and the `width - 1` tokens before it, [Q, width].

    Column d is the attention on the token d places back, averaged over heads; zero before the chunk. Block by block:
    the chunk's attention matrix never exists.

    Args:
        queries: [1, H, Q, D]; keys: the chunk's own, [1, G, Q, D].
        log_sum_exp: [1, H, Q] over everything that the queries attended to.
    """
    _, H, Q, D = queries.shape
    G = keys.shape[1]
    found = torch.zeros(Q, width, device=queries.device)
    back = torch.arange(width, device=queries.device)
    for start in range(0, Q, QUERY_BLOCK):
        stop, low = min(start + QUERY_BLOCK, Q), max(0, start - width + 1)
        packed = queries[:, :, start:stop].reshape(1, G, -1, D)
        logits = torch.matmul(packed, keys[:, :, low:stop].mT).float().mul_(scaling)
        weights = logits.sub_(log_sum_exp[:, :, start:stop].reshape(1, G, -1, 1)).exp_()
        mean = weights.view(H, stop - start, -1).mean(0)
        places = torch.arange(start, stop, device=queries.device)[:, None] - back
        found[start:stop] = mean.gather(1, (places - low).clamp(min=0)).masked_fill(places < 0, 0.0)
    return found


def triangle_scores(attention: Tensor, length: int) -> Tensor:
    """How much each stretch of `length` tokens keeps to itself, [Q - length + 1] by its start.

    The mean over its tokens of the attention that stays in the stretch (the triangle), less that on the `length` tokens
    before it (the square at the triangle's left).

    Args:
        attention: [Q, width] as `band` gives it, width >= 2 length.
    """
    Q = attention.shape[0]
    sums = attention.cumsum(1)
    starts, within = torch.arange(Q - length + 1)[:, None], torch.arange(length)[None]
    tokens = (starts + within).to(attention.device)
    inside = sums[tokens, within.to(attention.device)]
    before = sums[tokens, (within + length).to(attention.device)] - inside
    return (inside - before).mean(1)


def span_starts(attention: Tensor, shortest: int, longest: int) -> list[int]:
    """Where spans begin that cover a chunk: the best triangles that do not overlap, and what is left between them.

    Greedy non-maximum suppression over all stretches of `shortest`, twice that, ... and `longest` tokens.
    """
    Q = attention.shape[0]
    lengths, length = [longest], shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    candidates = [
        (score, start, length)
        for length in lengths
        if length <= Q
        for start, score in enumerate(triangle_scores(attention, length).tolist())
    ]
    taken = bytearray(Q)
    starts = {0}
    for _, start, length in sorted(candidates, reverse=True):
        if 1 not in taken[start : start + length]:
            taken[start : start + length] = b"\1" * length
            starts |= {start, start + length}
    return sorted(starts - {Q})
