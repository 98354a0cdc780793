"""What to say of a name that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of the known names where one is near, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}? There are {', '.join(names)}" if near else f"; there are {', '.join(names)}"
