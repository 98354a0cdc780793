"""From a name and options to an object, with an error that helps where there is none of that name."""

import difflib
from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any, TypeVar

from longfit.errors import InputError, UnknownNameError

T = TypeVar("T")


# Every class by kind and name: compressors of three kinds share one list of names.
_NAMED: dict[tuple[str, str], type] = {}


def register(kind: str, registry: MutableMapping[str, Any], cls: Any) -> None:
    """Enter a class that has a name of its own. A class may be defined again, as notebooks do.

    Raises:
        InputError: longfit itself has a `kind` of that name.
    """
    if not cls.name or "name" not in cls.__dict__:
        return
    known = _NAMED.get((kind, cls.name), cls)
    same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if not same and known.__module__.startswith(f"{__package__}."):
        raise InputError(f"{cls.name!r} is longfit's own {known.__qualname__}; give {cls.__qualname__} another name")
    _NAMED[kind, cls.name] = registry[cls.name] = cls


def make(kind: str, registry: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """The `kind` called `name`, a dataclass, with its options.

    Raises:
        UnknownNameError: nothing of that name; the message suggests the nearest.
        InputError: an option that it does not have.
    """
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(registry))}"
        raise UnknownNameError(
            f"no {kind} is called {name!r}; {hint} (One of your own: import its file, or --code FILE.)"
        )
    known = {f.name for f in fields(registry[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    return registry[name](**options)
