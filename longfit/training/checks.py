"""Checks of single values: each takes a value and its name, and returns it as it is used, or says what would do."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from longfit.errors import InputError

Check = Callable[[Any, str], Any]


def refusal(value: Any, name: str, wanted: str) -> InputError:
    """The error for a value that is not what was wanted."""
    return InputError(f"{name}={value!r} has to be {wanted}")


def as_number(value: Any) -> int | float | None:
    """A finite number, or None for anything else. A text that is one counts: YAML 1.1 reads `1e-3` as a text."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def number(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    hint: str = "",
) -> Check:
    """A finite number in a range.

    Args:
        least, most: the range with its ends; above, below: without them.
        whole: only whole numbers, which become int.
        hint: what else the error says.
    """
    ends = (("at least", least), ("above", above), ("at most", most), ("below", below))
    span = " and ".join(f"{word} {end}" for word, end in ends if end is not None)
    wanted = f"a {'whole ' if whole else ''}number{', ' if span else ''}{span}{hint}"

    def check(value: Any, name: str) -> int | float:
        found = as_number(value)
        if (
            found is None
            or (whole and found != int(found))
            or (least is not None and found < least)
            or (above is not None and found <= above)
            or (most is not None and found > most)
            or (below is not None and found >= below)
        ):
            raise refusal(value, name, wanted)
        return int(found) if whole else found

    return check


def whole(least: int, most: int | None = None) -> Check:
    """A whole number in a range."""
    return number(least=least, most=most, whole=True)


def text(value: Any, name: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise refusal(value, name, "a text that is not empty (in quotes, where it looks like a number)")
    return value


def flag(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refusal(value, name, "true or false")
    return value


def one_of(*allowed: str) -> Check:
    """One of some names. `no`, without quotes, is false in YAML 1.1: it is taken for the name where that is allowed."""

    def check(value: Any, name: str) -> Any:
        found = "no" if value is False else value
        if found not in allowed:
            raise refusal(value, name, f"one of {', '.join(allowed)}")
        return found

    return check


def optional(check: Check) -> Check:
    """None, or what passes another check."""
    return lambda value, name: None if value is None else check(value, name)


def listed(check: Check, what: str, length: int | None = None) -> Check:
    """A list of `what`, whose entries pass a check; of `length` entries, where that is given."""

    def checked_list(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise refusal(value, name, f"a list of {f'{length} ' if length else ''}{what}, such as [..., ...]")
        return [check(entry, f"{name}[{place}]") for place, entry in enumerate(value)]

    return checked_list


def mapping(check: Check | None = None) -> Check:
    """A mapping of texts to what passes a check."""

    def checked_mapping(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise refusal(value, name, "a mapping, such as {name: value}")
        return {key: check(entry, f"{name}.{key}") if check else entry for key, entry in value.items()}

    return checked_mapping


def table(known: Mapping[str, Check]) -> Check:
    """A mapping that has only known keys, each with its own check."""

    def checked_table(value: Any, name: str) -> dict[str, Any]:
        given = mapping()(value, name)
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"{name} has no key {', '.join(unknown)}; known: {', '.join(known)}")
        return {key: known[key](entry, f"{name}.{key}") for key, entry in given.items()}

    return checked_table
