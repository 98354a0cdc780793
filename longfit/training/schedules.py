"""Numbers that change during training: learning rate, context length, weights of losses."""

import math
from itertools import pairwise
from typing import Any

from longfit.errors import InputError
from longfit.training.checks import Check, as_number, whole

_RATIO = whole(1)


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
    if (only := as_number(given)) is not None:
        return [(0.0, only)]
    if not isinstance(given, list | tuple) or not all(_is_pair(entry) for entry in given):
        raise InputError(f"{name}={given!r} is neither a number nor [[progress, value], ...]")
    found = [(as_number(start), as_number(value)) for start, value in given]
    if any(start is None or value is None for start, value in found):
        raise InputError(f"{name}={given!r}: its points have to be numbers, [[progress, value], ...]")
    return _rising([(float(start), value) for start, value in found if start is not None], given, name)


def schedule(check: Check) -> Check:
    """A value, or `[[progress, value], ...]`, whose values pass a check."""

    def checked_schedule(given: Any, name: str) -> Any:
        found = [[start, check(value, name)] for start, value in points(given, name)]
        return found if isinstance(given, list | tuple) else found[0][1]

    return checked_schedule


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
        pairs: list[Any] = [(0.0, given)]
    elif all(_is_pair(entry) and isinstance(entry[1], list | tuple) and entry[1] for entry in given):
        pairs = [(as_number(start), values) for start, values in given]
    else:
        raise problem
    if any(start is None for start, _ in pairs):
        raise problem
    try:
        found = [(float(start), [_RATIO(value, name) for value in values]) for start, values in pairs]
    except InputError as error:
        raise problem from error
    return _rising(found, given, name)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2


def _rising(found: list[tuple[float, Any]], given: Any, name: str) -> list[tuple[float, Any]]:
    starts = [start for start, _ in found]
    if not found or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > 1:
        raise InputError(f"{name}={given!r}: the progress of its points has to rise from 0 and stay below 1")
    return found


def learning_rate(step: int, progress: float, warmup_steps: int, final: float) -> float:
    """Factor of the learning rate: up over `warmup_steps`, then down a cosine to `final` of it."""
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return up * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
