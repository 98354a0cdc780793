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
    _check_starts(found, given, name)
    if not all(isinstance(value, int | float) for _, value in found):
        raise InputError(f"{name}={given!r}: its values have to be numbers")
    return found


def choices(given: Any, name: str) -> list[tuple[float, list[int]]]:
    """The points of a schedule of lists: `[4, 8]` throughout, or `[[progress, [1, 2]], [progress, [4]], ...]`.

    Raises:
        InputError: a list is empty or holds anything but whole numbers from 1 on, or the progress does not rise from 0.
    """
    problem = InputError(
        f"{name}={given!r} has to be a list of whole numbers, at least 1, or [[progress, [number, ...]], ...]"
    )
    if not isinstance(given, list | tuple):
        raise problem
    if not any(isinstance(entry, list | tuple) for entry in given):
        found = [(0.0, list(given))]
    else:
        try:
            found = [(float(start), list(values)) for start, values in given]
        except (TypeError, ValueError) as error:
            raise problem from error
        if not all(values for _, values in found):
            raise problem
    _check_starts(found, given, name)
    if any(not isinstance(value, int) or value < 1 for _, values in found for value in values):
        raise problem
    return found


def _check_starts(found: list[tuple[float, Any]], given: Any, name: str) -> None:
    starts = [start for start, _ in found]
    if not found or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > 1:
        raise InputError(f"{name}={given!r}: the progress of its points has to rise from 0 and stay below 1")


def learning_rate(step: int, progress: float, warmup_steps: int, final: float) -> float:
    """Factor of the learning rate: up over `warmup_steps`, then down a cosine to `final` of it."""
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return up * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
