"""Packages that only some documents need."""

import importlib
from typing import Any

from longfit.errors import MissingPackageError


def needed(package: str, what: str) -> Any:
    """The module of a package of the extra `documents`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{what} needs {package}, which is not installed: pip install "longfit[documents]"'
        ) from error
