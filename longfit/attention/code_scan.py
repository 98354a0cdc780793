"""Scores of all stored keys from their packed 2-bit codes, in plain torch, block by block.

The path where no kernel runs: it holds the memory down, but to unpack codes takes a CPU several times as long as exact
scores do; see docs/attention/decode.md.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from longfit.cache.side_index import unpack_bits

BLOCK_TOKENS = 2048  # codes that are unpacked at once: they stay in a core's cache

Levels = tuple[float, float, float, float]


def code_nearness(query_codes: Tensor, codes: Tensor) -> Tensor:
    """Minus the Manhattan distance between 2-bit codes: higher is nearer.

    Args:
        query_codes: [B, G, R, W] uint8, four codes a byte as `pack_bits` packs them.
        codes: [B, G, n, W] uint8.

    Returns:
        [B, G, R, n] fp32, whole numbers from -12 W to 0.
    """
    # |a - b| = sum over t = 1, 2, 3 of |[a >= t] - [b >= t]|, and |x - y| = x + (1 - 2x) y for x and y of 0 or 1.
    query, steps = unpack_bits(query_codes), range(1, 4)
    at_least = torch.cat([query >= t for t in steps], -1).float()
    weights, constant = (2 * at_least - 1).mT, at_least.sum(-1).unsqueeze(-2)
    scores = []
    for block in codes.split(BLOCK_TOKENS, 2):
        keys = unpack_bits(block)
        scores.append(torch.cat([keys >= t for t in steps], -1).float() @ weights - constant)
    return torch.cat(scores, 2).mT


def code_products(queries: Tensor, codes: Tensor, levels: Levels) -> Tensor:
    """Dot products of queries in full precision with keys that are known by 2-bit codes only.

    Args:
        queries: [B, G, R, D'], in the codes' basis and scaled per channel.
        codes: [B, G, n, D' / 4] uint8, as `pack_bits` packs them.
        levels: the value that each code stands for.

    Returns:
        [B, G, R, n] fp32: the sum over d of queries[d] * levels[code[d]].
    """
    of_byte = torch.tensor(levels, device=codes.device)[
        unpack_bits(torch.arange(256, dtype=torch.uint8, device=codes.device)[:, None]).int()
    ]
    weights = queries.float().mT
    blocks = [embedding(block.int(), of_byte).flatten(-2) @ weights for block in codes.split(BLOCK_TOKENS, 2)]
    return torch.cat(blocks, 2).mT
