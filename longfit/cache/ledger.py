"""Who may keep how much, and where the next token stands: the accounts shared by all layers of a cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longfit.cache.part import Part
from longfit.cache.rotary import Rotary
from longfit.cache.slow_file import Shelf
from longfit.cache.store import Store
from longfit.units import share_of

ANGLE = "angle"


@dataclass
class Ledger:
    """Limits and rotary positions.

    In the `original` geometry a token keeps the rotary position that it had in the input, and what is dropped leaves
    holes. In the `packed` geometry the kept entries are numbered anew, up to the position before the next chunk, so
    that an input may be longer than the model's window. Packed keys rest un-rotated while the prefill streams and
    are rotated from there for each chunk; they are rotated in place once when decoding starts. A key is therefore
    rounded at most twice between two chunks, however long the input.

    Attributes:
        kept_tokens: entries to keep per layer and row; None for a ratio.
        keep_ratio: fraction of the real tokens to keep; None for a number.
        packed: the geometry.
        padding: left padding of each row, None before the first forward.
        blank: columns of each row before which sliding layers hold nothing, where that is not the padding.
        apart: rows are counted each by itself, whatever their padding.
        base: rotary position of each row's next token.
        frozen: packed keys are rotated in place (decoding).
        head_limit: entries that one head may keep where heads keep unlike numbers in the packed geometry, so that the
            longest stays within the model's window; None for any number.
        shelf: where the layers' slow tiers write; None before something is offloaded.
    """

    kept_tokens: int | None
    keep_ratio: float | None
    packed: bool
    padding: list[int] | None = None
    blank: list[int] | None = None
    apart: bool = False
    base: list[int] = field(default_factory=list)
    frozen: bool = False
    head_limit: int | None = None
    shelf: Shelf | None = None

    def kept_limit(self, total: int) -> int:
        """Entries that a row of `total` real tokens may keep in each layer."""
        if self.kept_tokens is not None:
            return self.kept_tokens
        assert self.keep_ratio is not None
        return share_of(total, self.keep_ratio)

    def places(self, part: Part) -> Tensor:
        """Rotary positions [B, G, n] of a packed part's entries: they end right before the next chunk."""
        assert part.store is not None
        n, first = part.kept, self.base[part.rows.start] - part.kept
        shape = part.store.positions.shape
        return torch.arange(first, first + n, device=part.store.positions.device).expand(shape)

    def angles(self, store: Store) -> Tensor:
        """Rotary positions [B, G, n] at which the keys of a store rest."""
        if not self.packed:
            return store.positions.long()
        return store.scores[ANGLE].long() if self.frozen else torch.zeros_like(store.positions, dtype=torch.long)

    def at_rest(self, part: Part, keys: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor | float]:
        """New keys [B, G, n, D] of a part as they are stored, and the position at which they are rotated then.

        The position matters in the packed geometry only.
        """
        if not self.packed:
            return keys, 0.0
        first, n = self.base[part.rows.start], keys.shape[2]
        angles = torch.arange(first, first + n, device=keys.device).expand(keys.shape[:3])
        if self.frozen:
            return keys, angles.float()
        assert rotary is not None
        return rotary.rotate(keys, -angles), 0.0

    def freeze(self, part: Part, rotary: Rotary | None) -> None:
        """Rotate a packed part's keys to their places, in place."""
        if part.store is None or not part.kept:
            return
        assert rotary is not None
        places = self.places(part)
        part.store.keys = rotary.rotate(part.store.keys, places)
        part.store.scores[ANGLE].copy_(places)

    def thaw(self, part: Part, rotary: Rotary | None) -> None:
        """Un-rotate a packed part's keys."""
        if part.store is None or not part.kept:
            return
        assert rotary is not None
        angles = part.store.scores[ANGLE]
        part.store.keys = rotary.rotate(part.store.keys, -angles.long())
        angles.zero_()
