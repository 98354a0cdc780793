"""The normalised Hadamard transform: spreads what a few outlying channels hold over all of them.

Inner products are the same in the new basis, and each new channel is a sum of all old ones, so that its values are
close to a Gaussian: a few levels a channel describe it well.
"""

from functools import cache

import torch
from torch import Tensor

SMALLEST = 4  # channels, so that 2-bit codes fill a byte


def padded_size(head_size: int) -> int:
    """D', the next power of two from `head_size` on, and 4 at least."""
    return max(SMALLEST, 1 << (head_size - 1).bit_length())


def hadamard(vectors: Tensor) -> Tensor:
    """Vectors [..., D] in the Hadamard basis, [..., D'] in fp32.

    D that is not a power of two is padded with zeros to the next one, which keeps inner products too.
    """
    D = vectors.shape[-1]
    return vectors.float() @ _matrix(padded_size(D), vectors.device)[:D]


@cache
def _matrix(size: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix [size, size] over the root of its size: orthogonal and symmetric."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5
