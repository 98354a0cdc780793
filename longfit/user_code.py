"""Files of the user's own that define compressors, patches or suites: importing one is all that they need."""

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from longfit.errors import InputError

# Files separated as in PATH: how a command hands them on to the processes that it starts.
VARIABLE = "LONGFIT_CODE"


def load_code(files: Iterable[str | Path], beside: Path | None = None) -> None:
    """Import Python files, each once, as modules called like them: `mine.py` becomes `mine`.

    Only what a user names is ever run so; memories and adapters name methods, never files.

    Args:
        beside: the folder that relative paths start from, where the file is there; the working directory else.

    Raises:
        InputError: a file that is not there or no Python, or one that is called like another module.
    """
    for given in files:
        places = [folder / Path(given).expanduser() for folder in (beside, Path()) if folder is not None]
        file = next((place.resolve() for place in places if place.is_file()), None)
        if file is None or file.suffix != ".py":
            raise InputError(f"code {str(given)!r} is not a Python file at {' or '.join(map(str, places))}")
        _load(file)


def load_from_environment() -> None:
    """Import the files that `LONGFIT_CODE` names.

    Raises:
        InputError: see `load_code`.
    """
    load_code(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))


def _load(file: Path) -> None:
    name = file.stem
    loaded = sys.modules.get(name)
    known = getattr(loaded, "__file__", None) if loaded else getattr(importlib.util.find_spec(name), "origin", None)
    if loaded and known and Path(known).resolve() == file:
        return
    if loaded or (known and Path(known).resolve() != file):
        raise InputError(f"{file} is called like the module {name} ({known}); give it another name")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
