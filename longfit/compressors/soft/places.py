"""Where slots stand among the tokens of a segment: appended, one after every group, or around every group."""

from typing import NamedTuple

import torch
from torch import Tensor

from longfit.compressors.soft.encoded import spans_of
from longfit.compressors.soft.layout import interleaved, mixed, stride_sizes


class Places(NamedTuple):
    """A segment of T tokens mixed with N slots, T + N entries.

    Attributes:
        tokens: [T] where the tokens stand.
        slots: [N] where the slots stand.
        kept: [M] which entries stay: the sinks, then one slot for every group.
        sources: [M, 2] the tokens of the context that each kept entry stands for.
    """

    tokens: Tensor
    slots: Tensor
    kept: Tensor
    sources: Tensor

    @property
    def total(self) -> int:
        """T + N."""
        return self.tokens.shape[0] + self.slots.shape[0]

    def mix(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """[B, T + N, E] from tokens [B, T, E] and slots [B, N, E]."""
        return mixed(tokens, slots, self.tokens, self.slots)

    @property
    def is_text(self) -> Tensor:
        """bool [T + N]."""
        text = torch.zeros(self.total, dtype=torch.bool)
        text[self.tokens] = True
        return text

    def text_positions(self, first: int) -> Tensor:
        """[T + N] rotary positions that count text only, from `first`; slots repeat the one before (0 at least)."""
        return (self.is_text.cumsum(0) - 1 + first).clamp(min=0)

    def text_window(self, allowed: Tensor) -> Tensor:
        """What sliding layers may see, bool [T + N, T + N]: tokens see text, as without slots; slots what `allowed`
        lets them."""
        text = torch.ones_like(allowed).tril() & self.is_text[None]
        return torch.where(self.is_text[:, None], text, allowed)

    def owners(self, sinks: int) -> Tensor:
        """[T + N] the group of each entry, slots included; -1 for sinks."""
        closing = self.kept[sinks:]
        owners = torch.searchsorted(closing, torch.arange(self.total))
        owners[:sinks] = -1
        return owners


def appended(tokens: int, sinks: int, ratio: int, first: int = 0) -> Places:
    """ceil((tokens - sinks) / ratio) slots after the segment, each of which stands for all of it but the sinks.

    Args:
        tokens: of the segment, `sinks` raw ones at its start included.
        ratio: tokens for each slot.
        first: tokens of the context before the segment.
    """
    slots = torch.arange(tokens, tokens + -(-(tokens - sinks) // ratio))
    whole = torch.tensor([[first + sinks, first + tokens]]).expand(len(slots), -1)
    return _places(torch.arange(tokens), slots, slots, sinks, whole, first)


def after_groups(tokens: int, sinks: int, ratio: int, first: int = 0) -> Places:
    """A slot after every `ratio` tokens that follow the sinks, and one after what is left. Arguments as above."""
    sizes = stride_sizes(tokens - sinks, ratio)
    text, slots = interleaved(sizes)
    return _places(
        torch.cat([torch.arange(sinks), text + sinks]),
        slots + sinks,
        slots + sinks,
        sinks,
        spans_of(sizes, first + sinks),
        first,
    )


def around_groups(tokens: int, sinks: int, ratio: int, first: int = 0) -> Places:
    """A slot before and a slot after every group, of which the later is kept. `slots` has all that open, then all
    that close. Arguments as above."""
    sizes = stride_sizes(tokens - sinks, ratio)
    closing = (sizes + 2).cumsum(0) - 1 + sinks
    opening = closing - sizes - 1
    is_text = torch.ones(tokens + 2 * len(sizes), dtype=torch.bool)
    is_text[torch.cat([opening, closing])] = False
    return _places(
        is_text.nonzero().squeeze(-1),
        torch.cat([opening, closing]),
        closing,
        sinks,
        spans_of(sizes, first + sinks),
        first,
    )


def _places(text: Tensor, slots: Tensor, kept: Tensor, sinks: int, spans: Tensor, first: int) -> Places:
    """With the sinks in front of what is kept."""
    ones = spans_of(torch.ones(sinks, dtype=torch.long), first)
    return Places(text, slots, torch.cat([torch.arange(sinks), kept]), torch.cat([ones, spans]))
