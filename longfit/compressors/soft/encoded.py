"""What a context becomes: slots, keys and values, or states, with their places. Differentiable, so training uses it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Keys [B, G, M, D] and values [B, G, M, Dv] of one layer, the keys rotated at `positions`: [M], or [B, M] in
    full-attention layers where each row keeps its own tokens."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def join(self, later: "Entries") -> "Entries":
        """Both, one after the other."""
        first, second = self.positions, later.positions
        if first.ndim != second.ndim:
            B = self.keys.shape[0]
            first, second = first.expand(B, -1), second.expand(B, -1)
        return Entries(
            torch.cat([self.keys, later.keys], 2),
            torch.cat([self.values, later.values], 2),
            torch.cat([first, second], -1),
        )

    def pick(self, slots: Tensor) -> "Entries":
        """The entries at `slots` [N], or [B, N] where each row has its own."""
        if slots.ndim == 2:
            B, G, _, D = self.keys.shape
            index = slots[:, None, :, None]
            at = self.positions.expand(B, -1)
            return Entries(
                self.keys.gather(2, index.expand(-1, G, -1, D)),
                self.values.gather(2, index.expand(-1, G, -1, self.values.shape[-1])),
                at.gather(1, slots),
            )
        return Entries(self.keys[:, :, slots], self.values[:, :, slots], self.positions[slots])

    def last(self, n: int) -> "Entries":
        """The last `n`, or all where there are fewer."""
        start = max(0, self.positions.shape[-1] - n)
        return Entries(self.keys[:, :, start:], self.values[:, :, start:], self.positions[..., start:])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Entries":
        """The same with every tensor that has rows changed."""
        positions = self.positions if self.positions.ndim == 1 else change(self.positions)
        return Entries(change(self.keys), change(self.values), positions)


@dataclass(frozen=True)
class Encoded:
    """A compressed context, for the reader. B rows of the same length, M slots.

    One of `soft`, `layers` and `states` says where the slots enter.

    Attributes:
        tokens_in: tokens of the context, sinks included.
        sources: [M, 2] for each slot the first token of the context that it stands for, and the one after the last;
            [B, M, 2] where each row keeps its own tokens.
        next_position: rotary position of the token that follows the context.
        soft: [B, M, E] input embeddings, at rotary positions 0 to M - 1.
        layers: keys and values of every layer; sliding layers hold the raw entries of their window.
        states: [B, M, Es] for cross-attention.
        scores: [B, M] what a trained scorer gave the slots; only methods that train one.
    """

    tokens_in: int
    sources: Tensor
    next_position: int
    soft: Tensor | None = None
    layers: tuple[Entries, ...] | None = None
    states: Tensor | None = None
    scores: Tensor | None = None

    @property
    def slots(self) -> int:
        """M."""
        return int(self.sources.shape[-2])

    @property
    def rows(self) -> int:
        """B."""
        if self.layers is not None:
            return int(self.layers[0].keys.shape[0])
        given = self.soft if self.soft is not None else self.states
        assert given is not None
        return int(given.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of what the reader is handed."""
        tensors = [t for t in (self.soft, self.states) if t is not None]
        tensors += [t for entries in self.layers or () for t in entries[:2]]
        return sum(t.nbytes for t in tensors)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The same with every tensor that has rows changed."""
        return replace(
            self,
            sources=self.sources if self.sources.ndim == 2 else change(self.sources),
            soft=None if self.soft is None else change(self.soft),
            layers=None if self.layers is None else tuple(entries.mapped(change) for entries in self.layers),
            states=None if self.states is None else change(self.states),
            scores=None if self.scores is None else change(self.scores),
        )

    def row(self, index: int) -> "Encoded":
        """One row alone: its positions are [M] and its sources [M, 2], whatever those of the batch were."""
        alone = self.mapped(lambda t: t[index : index + 1])
        layers = None if alone.layers is None else tuple(Entries(k, v, p.reshape(-1)) for k, v, p in alone.layers)
        return replace(alone, sources=alone.sources.reshape(-1, 2), layers=layers)

    def repeated(self, repeats: int) -> "Encoded":
        """Every row `repeats` times."""
        return self.mapped(lambda t: t.repeat_interleave(repeats, 0))

    def detach(self) -> "Encoded":
        """The same values, cut from the graph that made them."""
        return self.mapped(lambda t: t.detach())


def spans_of(groups: Tensor, offset: int = 0) -> Tensor:
    """Source spans [M, 2] of slots that stand for consecutive groups of `groups` [M] tokens each."""
    stops = groups.cumsum(0) + offset
    return torch.stack([stops - groups, stops], 1)
