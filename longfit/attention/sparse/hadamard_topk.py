"""Top-k by the product of the query in full precision with 2-bit keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention import kernels
from longfit.attention.base import Scene
from longfit.attention.codes import BLOCK_TOKENS, CodeIndex
from longfit.attention.hadamard import hadamard, padded_size
from longfit.attention.select import SelectingPatch

# Lloyd-Max: the four levels, and the edges between them, that describe a unit Gaussian with the least squared error.
EDGES = (-0.9816, 0.0, 0.9816)
LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)


@dataclass
class HadamardTopK(SelectingPatch):
    """Attends to the keys of highest dot product with the query, keys being known to 2 bits a channel.

    Ours, from Adamas (Yan et al. 2025) and asymmetric distances in vector search (Jégou et al. 2011): there is one
    query and there are many keys, so only the keys need be short. Keys, as rotated, go through a normalised Hadamard
    transform and each channel of each key/value head is centred on its mean, measured in its deviation sigma and
    rounded to one of the four Lloyd-Max levels of a Gaussian. A key's score is sum over d of q_d sigma_d level[code_d]:
    the means add the same to every key's score and leave the ranking as it is. Means and deviations are taken from the
    keys that are stored when the index is built, without a data set; they stay for the tokens that follow and are taken
    anew when the index is rebuilt or holds twice as many. A head size that is no power of two is padded with zeros for
    the transform. The codes take as many bytes as Adamas'.
    """

    name = "hadamard_topk"
    source = "ours, after Adamas (Yan et al. 2025)"
    summary = "top-k by the full query against 2-bit keys in the Hadamard basis"

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        return padded_size(key_dim) / 4

    def estimate(self, scene: Scene) -> Tensor:
        if not isinstance(scene.part.index, ChannelIndex):
            scene.part.index = ChannelIndex()
        index, store = scene.part.index, scene.part.store
        assert store is not None
        index.follow(store)
        codes = index.codes.used
        scene.read_bytes += codes.numel() + index.deviations.nbytes
        B, G, _, W = codes.shape
        queries = hadamard(scene.queries).view(B, G, -1, 4 * W)
        return kernels.code_products(queries * index.deviations, codes, LEVELS)


class ChannelIndex(CodeIndex):
    """Codes of channels that are centred and scaled by what the keys show: deviations [B, G, 1, D']."""

    deviations: Tensor

    def calibrate(self, keys: Tensor) -> Tensor:
        n = keys.shape[2]
        means = hadamard(keys.mean(2, keepdim=True, dtype=torch.float32))
        squares = torch.zeros_like(means)
        for block in keys.split(BLOCK_TOKENS, 2):
            squares += (hadamard(block) - means).square_().sum(2, keepdim=True)
        self.deviations = (squares / n).sqrt_()
        return torch.stack([means + edge * self.deviations for edge in EDGES])

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.deviations.nbytes
