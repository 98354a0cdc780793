"""Compressors: what they are called, and how to get one. Every class is also an attribute here, by its own name."""

from typing import Any

from longfit.compressors import kv
from longfit.compressors.base import KeepAll, KVCompressor, Wrapper, available, get

__all__ = ["KVCompressor", "KeepAll", "Wrapper", "available", "get", "kv"]


def __getattr__(name: str) -> Any:
    for compressor in available().values():
        if compressor.__name__ == name:
            return compressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(compressor.__name__ for compressor in available().values())])
