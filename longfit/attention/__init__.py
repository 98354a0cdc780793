"""Attention functions, through transformers' own interface, and the patches that stand in for full attention."""

from typing import Any

from longfit.attention import approximate, patterns, retrieve, sparse  # noqa: F401
from longfit.attention.base import AttentionPatch, Scene, available, get
from longfit.attention.bounded import NAMES, register

register()

__all__ = ["NAMES", "AttentionPatch", "Scene", "available", "get", "register"]


def __getattr__(name: str) -> Any:
    for patch in available().values():
        if patch.__name__ == name:
            return patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(patch.__name__ for patch in available().values())])
