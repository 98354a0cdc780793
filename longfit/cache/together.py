"""One trim over all heads of all layers at once, for methods that read the context again before they choose."""

from typing import TYPE_CHECKING

from longfit.cache.trim import SCORE, hold_to, oldest_first, put_last
from longfit.errors import BudgetExceededError

if TYPE_CHECKING:
    from longfit.cache.fit import FitCache


def trim_together(cache: "FitCache", seen: int | None = None, reserve: int = 0) -> None:
    """Trim every row of a cache to its limit.

    Args:
        seen: columns for which the limit is meant; those seen by default.
        reserve: leave room for so many more entries in each head.

    Raises:
        BudgetExceededError: the cache holds more than its limit afterwards.
    """
    layers = cache.bounded
    for row in sorted({part.rows.start for layer in layers for part in layer.parts}):
        owned = [(layer, part, part.store) for layer, part in cache.parts_of(row) if part.store is not None]
        padding = cache.ledger.padding[row] if cache.ledger.padding else 0
        heads = len(owned) // max(1, len(layers))
        limit = heads * sum(layer.limit(padding, seen or cache.seen) for layer in layers)
        if sum(part.kept + (reserve > 0) for _, part, _ in owned) <= limit:
            continue
        if (most := cache.ledger.head_limit) is not None:
            limit = min(limit, sum(min(part.kept, most) for _, part, _ in owned))
        scores = [oldest_first(store.scores[SCORE], store.positions) for _, _, store in owned]
        for (layer, part, store), given in zip(owned, scores, strict=True):
            dead = layer.unreachable(store.positions, layer.seen - padding, part.state)
            if dead is not None:
                put_last(given, dead, store.positions)
            hold_to(given, most, store.positions)
        chosen = cache.method.select_together(scores, limit - reserve * len(owned))
        for (layer, part, store), indices in zip(owned, chosen, strict=True):
            layer.keep(part, store, indices.sort(-1).values, indices.shape[-1] + reserve)
        for layer in layers:
            layer.dropped += 1
        kept = sum(part.kept for _, part, _ in owned)
        if kept > limit:
            raise BudgetExceededError(f"the cache holds {kept} entries, its limit is {limit}")
