"""Tokens that leave all layers together, and come back by being forwarded again.

A patch that stores "released" says which tokens of a row stay (`stay`) and which of the others its next token needs
(`recall`). What it knows of them it keeps in its parts' states, so it moves, forks and is counted with the cache.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longfit.cache.part import Part
from longfit.errors import BudgetExceededError

if TYPE_CHECKING:
    from longfit.cache.fit import FitCache


def recall(cache: "FitCache") -> tuple[list[list[int]], Tensor]:
    """What the next token needs again: ascending positions for each row, and ids [rows, most of any row].

    Rows that need fewer have zeros in front.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    again = [
        cache.patch.recall(*_known(cache, row, parts)) if parts[0].kept else (nothing, nothing)
        for row, parts in _rows(cache)
    ]
    ids = torch.zeros(len(again), max(len(places) for places, _ in again), dtype=torch.long)
    for row, (_, own) in zip(ids, again, strict=True):
        row[len(row) - len(own) :] = own
    return [places.tolist() for places, _ in again], ids


def release(cache: "FitCache") -> None:
    """Trim every layer of each row to the same tokens, in order of position.

    Raises:
        BudgetExceededError: a layer holds more than its limit afterwards.
    """
    for row, parts in _rows(cache):
        again = bool(cache.step.again and cache.step.again[row])
        limit = min(layer.limit(parts[0].padding, cache.seen) for layer in cache.bounded)
        kept = parts[0].kept
        if kept == 0 or (kept <= limit and not again):
            continue
        slots = cache.patch.stay(*_known(cache, row, parts), limit)
        for layer, part in zip(cache.bounded, parts, strict=True):
            assert part.store is not None
            chosen = slots.to(part.store.positions.device).expand(*part.store.positions.shape[:2], -1)
            layer.keep(part, part.store, chosen, slots.shape[0])
            layer.dropped += kept - part.kept
            if part.kept > limit:
                raise BudgetExceededError(f"layer {layer.index} holds {part.kept} entries, its limit is {limit}")


def _rows(cache: "FitCache") -> Iterator[tuple[int, list[Part]]]:
    """The parts of each row, layer by layer."""
    return enumerate(map(list, zip(*(layer.parts for layer in cache.bounded), strict=True)))


def _known(cache: "FitCache", row: int, parts: list[Part]) -> tuple[list[dict[str, Tensor]], Tensor, int]:
    """The states of a row, the positions [n] that it holds and the tokens that it has seen."""
    store, padding = parts[0].store, cache.ledger.padding[row] if cache.ledger.padding else 0
    assert store is not None
    return [part.state for part in parts], store.positions[0, 0].long(), cache.seen - padding
