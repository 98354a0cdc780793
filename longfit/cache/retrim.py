"""One prefill, every method: trim a recorded cache again, by another method, to another size."""

from dataclasses import replace
from typing import Any

import torch

from longfit.cache.fit import FitCache
from longfit.cache.layer import BoundedLayer
from longfit.cache.ledger import ANGLE, Ledger
from longfit.cache.part import Part
from longfit.cache.row import Row
from longfit.cache.sliding import SlidingLayer
from longfit.cache.store import Store
from longfit.cache.together import trim_together
from longfit.cache.trim import SCORE
from longfit.errors import InputError


def retrim(
    recorded: FitCache, decoder: Any, method: Any, ledger: Ledger, question_tokens: int = 0, patch: Any = None
) -> FitCache:
    """A new cache: what `method` would have left of the same input, read in one chunk.

    Trimming a layer happens after its attention and before the next layer, which reads hidden states and not the cache;
    so within one chunk no choice can change another layer's entries, and all methods share one prefill exactly.

    Args:
        recorded: a cache that holds everything, filled by a `Recorder`.
        decoder: the module with the rotary embedding.
        method: not one that replays, unless the recorded cache holds its scores.
        ledger: the new limits and geometry; its padding and positions are set here.
        question_tokens: the last tokens are the question, and `method` looks at it.
        patch: the attention that decodes from it.

    Raises:
        InputError: the recorded cache was padded or has dropped something.
    """
    if any(recorded.ledger.padding or []) or any(layer.dropped for layer in recorded.bounded) or recorded.rows != 1:
        raise InputError("only a recorded cache of one row, which holds everything, can be trimmed again")
    cache = FitCache(recorded.config, decoder, method, ledger, recorded.max_positions, patch)
    cache.chunk_tokens, cache.chunks, cache.rows = recorded.chunk_tokens, recorded.chunks, 1
    cache.question_aware = bool(question_tokens)
    ledger.padding, ledger.base, ledger.frozen = [0], [recorded.seen], False
    cache.step.__dict__.update(replace(recorded.step, total_tokens=recorded.seen).__dict__)
    for old, new in zip(recorded.own_layers, cache.own_layers, strict=True):
        if isinstance(old, SlidingLayer) and isinstance(new, SlidingLayer):
            assert old.keys is not None and old.values is not None
            new.lazy_initialization(old.keys, old.values)
            new.keys, new.values, new.cumulative_length = old.keys, old.values, old.cumulative_length
        elif isinstance(old, BoundedLayer) and isinstance(new, BoundedLayer):
            _take_over(old, new, question_tokens)
    if method.replays:
        trim_together(cache)
    if ledger.packed:
        for layer in cache.bounded:
            for part in layer.parts:
                ledger.thaw(part, layer.rotary)
    return cache


def _take_over(old: BoundedLayer, new: BoundedLayer, question_tokens: int) -> None:
    (part,) = old.parts
    assert part.store is not None
    heads = part.heads.stop
    slices = [slice(g, g + 1) for g in range(heads)] if new.method.ragged else [slice(0, heads)]
    new.is_initialized, new.seen, new.scaling = True, old.seen, old.scaling
    new.dtype, new.device = old.dtype, old.device
    for heads_slice in slices:
        new.parts.append(_narrow(part, heads_slice, heads, new))
    row = Row(new, new.parts)
    views = [row.view(p, p.store, new=p.kept, n_keep=0) for p in new.parts]
    window = question_tokens or new.method.window_tokens
    for view in views:
        view.next_position = old.seen
        view.protected = question_tokens
        if view.queries is not None and view.query_positions is not None and window:
            view.queries, view.query_positions = view.queries[:, :, -window:], view.query_positions[-window:]
        view.n_keep = new.limit(0, new.seen)
    if not new.method.replays and new.parts[0].kept > views[0].n_keep:
        row.trim([p.store for p in new.parts if p.store is not None], views, views[0].n_keep)
    own = new.method.window_tokens
    for p in new.parts:
        if own and p.queries is not None and p.query_positions is not None:
            p.queries, p.query_positions = p.queries[:, :, -own:], p.query_positions[-own:]
        else:
            p.forget_queries()


def _narrow(part: Part, heads: slice, all_heads: int, layer: BoundedLayer) -> Part:
    """The part restricted to some heads, sharing memory; nothing writes into it before it is trimmed."""
    assert part.store is not None
    queries = part.queries
    if queries is not None:
        group = queries.shape[1] // all_heads
        queries = queries[:, heads.start * group : heads.stop * group]
    store: Store = part.store.map(lambda t: t[:, heads], part.store.n)
    names = layer.score_names
    recorded = dict(store._scores)
    store._scores = {name: recorded[name].clone() for name in names if name in recorded and name != ANGLE}
    if ANGLE in names:
        store._scores[ANGLE] = store._positions.float()
    if SCORE in names and SCORE not in store._scores:
        store._scores[SCORE] = torch.full_like(store._positions, float("inf"), dtype=torch.float32)
    # Only the method's own: the recorded part has the state of all that were watching.
    state = {name: part.state[name] for name in layer.method.state_names if name in part.state}
    for name, t in state.items():
        if t.dim() > 1:
            group = t.shape[1] // all_heads
            state[name] = t[:, heads.start * group : heads.stop * group]
    return Part(part.rows, heads, 0, store, queries, part.query_positions, state)
