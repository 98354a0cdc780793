"""What a prompt compressor left out before the cache saw anything, and what it may leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.units import share_of


@dataclass(frozen=True)
class Allowance:
    """What a prompt may be shortened to.

    Attributes:
        kept_tokens: tokens of each row; None for a ratio.
        keep_ratio: fraction of each row's tokens; None for a number.
        last: nothing behind the prompt compressor trims any further, so all of it is to be used.
        reserved: of `kept_tokens`, room for what is generated.
    """

    kept_tokens: int | None
    keep_ratio: float | None
    last: bool
    reserved: int = 0

    def tokens(self, total: int) -> int:
        """Tokens that a row of `total` tokens may become."""
        if self.kept_tokens is not None:
            return max(0, self.kept_tokens - self.reserved)
        assert self.keep_ratio is not None
        return share_of(total, self.keep_ratio)


@dataclass
class Shortened:
    """The prompt that a cache has read in place of the one that was given.

    The cache counts in columns of its own, those of the shorter prompt; whoever calls `generate` counts in those of the
    prompt that was given.

    Attributes:
        ids: [B, T] the shorter prompt, left-padded.
        own_padding: columns of left padding of each row of `ids`.
        places: for each row, [n] the place among the row's given tokens of each token that was kept.
        tokens: real tokens of each row as given.
        padding: columns of left padding of each row as given.
        columns: of the prompt as given, less those of `ids`.
    """

    ids: Tensor
    own_padding: list[int]
    places: list[Tensor]
    tokens: list[int]
    padding: list[int]
    columns: int

    def sources(self, row: int, positions: Tensor) -> Tensor:
        """Places among the tokens given, of tokens at `positions` of the row as the cache counts."""
        kept = self.places[row].to(positions.device)
        n = kept.shape[0]
        later = positions.long() - n + self.tokens[row]
        if not n:
            return later
        return torch.where(positions < n, kept[positions.long().clamp(max=n - 1)], later)

    def without_last(self, n: int) -> "Shortened":
        """The same without the last `n` tokens of every row, which were kept."""
        if not n:
            return self
        places, tokens = [kept[:-n] for kept in self.places], [total - n for total in self.tokens]
        return Shortened(self.ids[:, :-n], self.own_padding, places, tokens, self.padding, self.columns)

    def spans(self, row: int = 0) -> list[tuple[int, int]]:
        """Stretches of the row's given tokens that were kept, [first, stop)."""
        found: list[tuple[int, int]] = []
        for place in self.places[row].tolist():
            if found and found[-1][1] == place:
                found[-1] = (found[-1][0], place + 1)
            else:
                found.append((place, place + 1))
        return found

    def repeated(self, repeats: int) -> "Shortened":
        """Every row `repeats` times."""

        def each(rows: list) -> list:
            return [row for row in rows for _ in range(repeats)]

        return Shortened(
            self.ids.repeat_interleave(repeats, 0),
            each(self.own_padding),
            each(self.places),
            each(self.tokens),
            each(self.padding),
            self.columns,
        )
