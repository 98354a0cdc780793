"""Putting a memory into an empty cache: entries that stand for a context which the cache itself never saw."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longfit.cache.fit import FitCache
from longfit.cache.layer import BoundedLayer
from longfit.cache.ledger import ANGLE, Ledger
from longfit.cache.sliding import SlidingLayer
from longfit.cache.store import Store
from longfit.cache.trim import SCORE


class Placed(NamedTuple):
    """Entries of one layer for some rows: keys [b, G, M, D] rotated at `angles` [M] or [b, M], values
    [b, G, M, Dv], and the `places` [M] or [b, M] that they have among the tokens of the context."""

    keys: Tensor
    values: Tensor
    angles: Tensor
    places: Tensor


class Memo(NamedTuple):
    """A memory of some rows of a batch: the entries of every layer, and the rotary position that follows them."""

    rows: slice
    layers: Sequence[Placed]
    next_position: int


def place(cache: FitCache, memos: Sequence[Memo], padding: list[int], columns: int, room: int) -> None:
    """Fill an empty cache, as if it had seen `columns` columns.

    Args:
        memos: one for all rows, or one for each; rows without a context have none.
        padding: columns of left padding of each row.
        columns: of the context, padding included.
        room: further entries to allocate for.
    """
    batch = len(padding)
    cache.rows, ledger = batch, cache.ledger
    ledger.padding, ledger.apart = list(padding), len(memos) != 1 or memos[0].rows != slice(0, batch)
    ledger.base = [max(columns - p, 0) for p in padding]
    if ledger.packed:
        ledger.base = [0] * batch
        for memo in memos:
            for row in range(memo.rows.start, memo.rows.stop):
                ledger.base[row] = memo.next_position
    for index, layer in enumerate(cache.own_layers):
        given = [(memo.rows, memo.layers[index]) for memo in memos]
        if isinstance(layer, BoundedLayer):
            _place_bounded(layer, given, batch, columns, room)
        else:
            _place_sliding(layer, given, batch, columns, ledger)


def _place_bounded(layer: BoundedLayer, given: list[tuple[slice, Placed]], batch: int, columns: int, room: int) -> None:
    like = given[0][1]
    layer.lazy_initialization(
        like.keys.new_empty(batch, *like.keys.shape[1:]), like.values.new_empty(batch, *like.values.shape[1:])
    )
    layer.seen = columns
    for part in layer.parts:
        for rows, placed in given:
            if not rows.start <= part.rows.start < rows.stop:
                continue
            at = slice(part.rows.start - rows.start, part.rows.stop - rows.start)
            keys, values = placed.keys[at, part.heads], placed.values[at, part.heads]
            angles = _rows(placed.angles, at).expand(keys.shape[:3])
            if layer.ledger.packed:
                assert layer.rotary is not None
                keys, angles = layer.rotary.rotate(keys, -angles), torch.zeros_like(angles)
            capacity = keys.shape[2] + room
            part.store = Store(keys, values, capacity, layer.score_names)
            known: dict[str, Tensor | float] = {SCORE: float("inf"), ANGLE: angles.float()}
            part.store.append(keys, values, _rows(placed.places, at).to(torch.int32), known, capacity)


def _rows(given: Tensor, rows: slice) -> Tensor:
    """[M] as it is; of [b, M] the rows, with a dimension for heads."""
    return given if given.ndim == 1 else given[rows][:, None]


def _last(placed: Placed, entries: int) -> Placed:
    start = max(0, placed.keys.shape[2] - entries)
    return Placed(placed.keys[:, :, start:], placed.values[:, :, start:], placed.angles[start:], placed.places[start:])


def _place_sliding(
    layer: SlidingLayer, given: list[tuple[slice, Placed]], batch: int, columns: int, ledger: Ledger
) -> None:
    most_kept = layer.sliding_window - 1
    given = [(rows, _last(placed, most_kept)) for rows, placed in given]
    like = given[0][1]
    most = max(placed.keys.shape[2] for _, placed in given)
    keys = like.keys.new_zeros(batch, like.keys.shape[1], most, like.keys.shape[3])
    values = like.values.new_zeros(batch, like.values.shape[1], most, like.values.shape[3])
    layer.lazy_initialization(keys, values)
    if most < min(most_kept, columns) or any(placed.keys.shape[2] != most for _, placed in given):
        ledger.blank = ledger.blank or list(ledger.padding or [0] * batch)
        for rows, placed in given:
            for row in range(rows.start, rows.stop):
                ledger.blank[row] = columns - placed.keys.shape[2]
    for rows, placed in given:
        n = placed.keys.shape[2]
        keys[rows, :, most - n :], values[rows, :, most - n :] = placed.keys, placed.values
    layer.keys, layer.values, layer.cumulative_length = keys, values, columns


def stand_for(cache: FitCache, places: Sequence[tuple[slice, Tensor]], padding: list[int], columns: int) -> None:
    """Let what the cache holds (slots that were read as tokens) stand for `columns` columns of a context.

    Args:
        places: for rows, the places [M] among the tokens of the context that their entries stand for.
        padding: the context's left padding of each row.
        columns: of the context, padding included.
    """
    before = cache.ledger.padding or [0] * len(padding)
    cache.ledger.padding = list(padding)
    for layer in cache.own_layers:
        if isinstance(layer, SlidingLayer):
            slots, layer.cumulative_length = layer.cumulative_length, columns
            cache.ledger.blank = [columns - (slots - p) for p in before]
            continue
        layer.seen = columns
        for part in layer.parts:
            part.padding = padding[part.rows.start]
            for rows, given in places:
                if part.store is not None and rows.start <= part.rows.start < rows.stop:
                    left = part.store.positions.long()  # slots that were not trimmed while they were read
                    part.store.positions.copy_(given.to(left.device)[left])
