"""The packed geometry from forward to forward: kept entries are numbered anew, up to the next token."""

from typing import TYPE_CHECKING, Any

import torch

from longfit.cache.sliding import SlidingLayer

if TYPE_CHECKING:
    from longfit.cache.fit import FitCache


def renumber(cache: "FitCache", columns: int) -> None:
    """Set where the next forward of `columns` tokens starts, and bring the keys into its frame."""
    ledger, decode = cache.ledger, cache.step.phase == "decode"
    if decode and ledger.frozen and max(ledger.base) + columns <= cache.max_positions:
        return
    before = ledger.base
    if ledger.frozen:
        _each_part(cache, ledger.thaw)
    ledger.base = [max((part.kept for _, part in cache.parts_of(row)), default=0) for row in range(cache.rows)]
    ledger.frozen = decode
    if decode:
        _each_part(cache, ledger.freeze)
    moved = torch.tensor([new - old for new, old in zip(ledger.base, before, strict=True)])
    for layer in cache.own_layers:
        if isinstance(layer, SlidingLayer):
            layer.move(moved)
    _each_part(cache, lambda part, rotary: part.move_queries(int(moved[part.rows.start]), rotary))


def _each_part(cache: "FitCache", change: Any) -> None:
    for layer in cache.bounded:
        for part in layer.parts:
            change(part, layer.rotary)
