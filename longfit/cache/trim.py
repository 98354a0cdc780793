"""One path from scores to kept entries, for every method."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.cache.store import Store
from longfit.cache.view import View
from longfit.errors import ScoreError

SCORE = "score"
CERTAIN = 1e20  # times the position: what may not be dropped
UNSEEN = -1e30  # divided by the position: what no query looks at any more goes before all else, the oldest first
SINK = 1e35  # above all that: what is dropped last


def score(method: Any, candidates: list[Store], views: list[View]) -> list[Tensor]:
    """The method's scores [B, G, S] of each part of a row; higher is kept.

    Methods that persist their scores are asked during prefill only; afterwards what they said then decides.

    Raises:
        ScoreError: a score is NaN or the shape is not [B, G, S].
    """
    if method.persists and (method.replays or views[0].phase == "decode"):
        return [candidate.scores[SCORE] for candidate in candidates]
    scores = [method.score(view) for view in views]
    for view, given in zip(views, scores, strict=True):
        if given.shape != view.positions.shape:
            raise ScoreError(
                f"{method!r} scored layer {view.layer} with shape {tuple(given.shape)}; "
                f"score() has to return [B, G, S] = {tuple(view.positions.shape)}"
            )
        if bool(given.isnan().any()):
            raise ScoreError(
                f"{method!r} gave NaN scores in layer {view.layer}: keys, values or attention overflowed; "
                "try bfloat16 or float32 instead of float16"
            )
    if method.persists:
        for candidate, given in zip(candidates, scores, strict=True):
            candidate.scores[SCORE].copy_(given)
    return scores


def trim(
    method: Any,
    candidates: list[Store],
    views: list[View],
    n_keep: int,
    unreachable: Callable[[Tensor, int, dict[str, Tensor]], Tensor | None] = lambda positions, seen, state: None,
    most: int | None = None,
) -> list[Tensor]:
    """Ascending indices [B, G, N] of the entries to keep in each part of a row, n_keep a head on average.

    Args:
        unreachable: which entries, from positions [B, G, S], the tokens seen and the part's state, no later query
            attends to: they go first.
        most: entries that one head may keep; None for any number.

    Raises:
        ScoreError: the method's choice is not exactly as large as asked.
    """
    scores = [
        oldest_first(given, c.positions) for given, c in zip(score(method, candidates, views), candidates, strict=True)
    ]
    for view, given in zip(views, scores, strict=True):
        if (dead := unreachable(view.positions, view.seen, view.state)) is not None:
            put_last(given, dead, view.positions)
        if view.protected:
            given[..., -view.protected :] = float("inf")
        hold_to(given, most, view.positions)
    chosen = [indices.sort(-1).values for indices in method.select(views, scores, n_keep)]
    kept = sum(indices.shape[-1] for indices in chosen)
    if kept != n_keep * len(views):
        raise ScoreError(f"{method!r} kept {kept} entries where {n_keep * len(views)} were asked for")
    return chosen


def hold_to(scores: Tensor, most: int | None, positions: Tensor) -> None:
    """Rank all but the `most` best entries of each head below everything else, in place."""
    if most is not None and scores.shape[-1] > most:
        best = scores.topk(most, -1).indices
        put_last(scores, torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False), positions)


def put_last(scores: Tensor, dead: Tensor, positions: Tensor) -> None:
    """Rank what no later query attends to below everything else, in place; the newest of it highest."""
    scores.copy_(torch.where(dead, UNSEEN / (positions.float() + 1.0), scores))


def oldest_first(scores: Tensor, positions: Tensor) -> Tensor:
    """An fp32 copy of `scores` in which entries that may not be dropped (+inf) rank by age above all others.

    So when even those are more than fit, the oldest yield.
    """
    return torch.where(scores.isposinf(), CERTAIN * (positions.float() + 1.0), scores.float())
