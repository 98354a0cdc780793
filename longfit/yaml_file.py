"""Recipes are YAML mappings."""

from pathlib import Path
from typing import Any

import yaml

from longfit.errors import InputError


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        InputError: no such file, or no YAML mapping in it.
    """
    if not path.is_file():
        raise InputError(f"recipe {str(path)!r} does not exist")
    try:
        source = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {str(path)!r} is not YAML: {error}") from error
    if not isinstance(source, dict):
        raise InputError(f"recipe {str(path)!r} is not a YAML mapping")
    return source
