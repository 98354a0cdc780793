"""From a name and options to an object, with an error that helps where there is none of that name."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from longfit.errors import InputError, UnknownNameError

T = TypeVar("T")


def make(kind: str, registry: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """The `kind` called `name`, a dataclass, with its options.

    Raises:
        UnknownNameError: nothing of that name; the message suggests the nearest.
        InputError: an option that it does not have.
    """
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(registry))}"
        raise UnknownNameError(f"no {kind} is called {name!r}; {hint}")
    known = {f.name for f in fields(registry[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    return registry[name](**options)
