"""Numbers that change during training: learning rate, context length, weights of losses."""

import math
from itertools import pairwise
from typing import Any

from longfit.errors import InputError


def stepwise(given: Any, progress: float, name: str) -> Any:
    """A value, or the last of `[[progress, value], ...]` whose progress (0 to 1) has been reached."""
    value = None
    for start, then in points(given, name):
        if progress >= start:
            value = then
    return value


def linear(given: Any, progress: float, name: str) -> float:
    """A value, or what lies between the points of `[[progress, value], ...]`."""
    found = points(given, name)
    for (start, before), (stop, after) in pairwise(found):
        if start <= progress < stop:
            return float(before + (after - before) * (progress - start) / (stop - start))
    return float(found[-1][1] if progress >= found[-1][0] else found[0][1])


def points(given: Any, name: str) -> list[tuple[float, Any]]:
    """The points of a schedule, checked.

    Raises:
        InputError: it does not start at 0, does not rise, or is neither a number nor a list of pairs.
    """
    if isinstance(given, int | float):
        return [(0.0, given)]
    try:
        found = [(float(start), value) for start, value in given]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={given!r} is neither a number nor [[progress, value], ...]") from error
    starts = [start for start, _ in found]
    if not found or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > 1:
        raise InputError(f"{name}={given!r}: the progress of its points has to rise from 0 and stay below 1")
    if not all(isinstance(value, int | float) for _, value in found):
        raise InputError(f"{name}={given!r}: its values have to be numbers")
    return found


def learning_rate(step: int, progress: float, warmup_steps: int, final: float) -> float:
    """Factor of the learning rate: up over `warmup_steps`, then down a cosine to `final` of it."""
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return up * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
