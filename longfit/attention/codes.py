"""Keys as 2-bit codes in the Hadamard basis: the index behind the selectors that scan codes in place of keys."""

import torch
from torch import Tensor

from longfit.attention.hadamard import hadamard
from longfit.cache.side_index import Rows, SideIndex, pack_bits
from longfit.cache.store import Store

BLOCK_TOKENS = 4096  # keys that are transformed at once, so that building needs no second copy of the keys


class CodeIndex(SideIndex):
    """Packed codes [B, G, n, D' / 4] of the keys of one store.

    A code is how many of three ascending edges its value exceeds. A method writes `calibrate`, which gives the edges;
    what it takes from the keys stays as it is for the tokens that are appended, until the index is built anew or holds
    twice as many keys.
    """

    codes: Rows
    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calibrated = 0

    def calibrate(self, keys: Tensor) -> Tensor:
        """Edges [3, B or 1, G or 1, 1, D' or 1] in fp32 for keys [B, G, n, D]."""
        raise NotImplementedError

    def follow(self, store: Store) -> None:
        if store.n >= 2 * self.calibrated:
            self.store = None
        super().follow(store)

    def build(self, keys: Tensor) -> None:
        self.edges, self.calibrated = self.calibrate(keys), keys.shape[2]
        self.codes = Rows(self._encoded(keys))

    def extend(self, keys: Tensor) -> None:
        self.codes.append(self._encoded(keys))

    def _encoded(self, keys: Tensor) -> Tensor:
        blocks = [pack_bits(bucketed(hadamard(block), self.edges)) for block in keys.split(BLOCK_TOKENS, 2)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.edges.nbytes


def bucketed(values: Tensor, edges: Tensor) -> Tensor:
    """How many of the edges [3, ...] each of the values [B, G, n, D'] exceeds: uint8 from 0 to 3."""
    codes = (values > edges[0]).to(torch.uint8)
    return codes.add_(values > edges[1]).add_(values > edges[2])
