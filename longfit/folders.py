"""Where longfit keeps what it makes for itself."""

import os
from pathlib import Path


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where converted models and compiled code live: `cache_dir`, else $LONGFIT_CACHE, else $XDG_CACHE_HOME/longfit,
    else ~/.cache/longfit."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if folder := os.environ.get("LONGFIT_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "longfit"
    return Path.home() / ".cache" / "longfit"
