"""What a sparse attention keeps beside the keys to find the few that matter: pages, codes, and their kin."""

import torch
from torch import Tensor

from longfit.cache.store import Store

GROWTH = 8  # a full buffer grows by an eighth, and by 256 slots at least
GROWTH_SLOTS = 256


class SideIndex:
    """Derived data of one store's keys, brought up to date by `follow`.

    A method writes `build` and `extend`. Appending extends; trimming, reordering and re-rotation build anew.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.version = 0
        self.n = 0

    def build(self, keys: Tensor) -> None:
        """Start over with keys [B, G, n, D]."""
        raise NotImplementedError

    def extend(self, keys: Tensor) -> None:
        """Add the new keys [B, G, m, D] behind those known."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        raise NotImplementedError

    def follow(self, store: Store) -> None:
        """Let the index describe exactly the entries of `store`."""
        if store is not self.store or store.version != self.version or store.n < self.n:
            self.build(store.keys)
        elif store.n > self.n:
            self.extend(store.keys[:, :, self.n :])
        self.store, self.version, self.n = store, store.version, store.n


class Rows:
    """A tensor [B, G, n, ...] that grows along n in buffers with room to spare."""

    def __init__(self, first: Tensor) -> None:
        self.n = first.shape[2]
        self.buffer = first.contiguous()

    @property
    def used(self) -> Tensor:
        return self.buffer[:, :, : self.n]

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def append(self, new: Tensor) -> None:
        """Add [B, G, m, ...] at the end."""
        self.buffer = appended(self.buffer, new, self.n)
        self.n += new.shape[2]


def appended(buffer: Tensor | None, new: Tensor, n: int) -> Tensor:
    """The buffer [B, G, capacity, ...] with `new` [B, G, m, ...] behind its first `n` entries, in place or grown."""
    end = n + new.shape[2]
    if buffer is None or end > buffer.shape[2]:
        grown = new.new_zeros(*new.shape[:2], end + max(GROWTH_SLOTS, end // GROWTH), *new.shape[3:])
        if buffer is not None:
            grown[:, :, :n] = buffer[:, :, :n]
        buffer = grown
    buffer[:, :, n:end] = new
    return buffer


def pack_bits(codes: Tensor) -> Tensor:
    """Four 2-bit codes a byte: [..., D] uint8 in 0..3 to [..., D / 4]; code i of a byte sits at bits 2i and 2i + 1.

    D has to be a multiple of four.
    """
    four = codes.view(*codes.shape[:-1], -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
    return (four << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`: [..., D / 4] to [..., D]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)
