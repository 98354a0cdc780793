"""Compressors: what they are called, and how to get one. Every class is also an attribute here, by its own name."""

from typing import Any

from longfit.compressors import kv, prompt, soft
from longfit.compressors.base import KeepAll, KVCompressor, Wrapper
from longfit.compressors.base import available as available_kv
from longfit.compressors.prompt import PromptCompressor
from longfit.compressors.prompt import available as available_prompt
from longfit.compressors.soft import Encoded, LearnedCompressor
from longfit.compressors.soft import available as available_soft
from longfit.registry import make

__all__ = [
    "Encoded",
    "KVCompressor",
    "KeepAll",
    "LearnedCompressor",
    "PromptCompressor",
    "Wrapper",
    "available",
    "available_kv",
    "available_prompt",
    "available_soft",
    "get",
    "kv",
    "prompt",
    "soft",
]


def available() -> dict[str, type[KVCompressor] | type[LearnedCompressor] | type[PromptCompressor]]:
    """All registered compressors by name."""
    known: dict[str, Any] = {**available_kv(), **available_soft(), **available_prompt()}
    return dict(sorted(known.items()))


def get(name: str, **options: Any) -> Any:
    """The compressor `name` with its options.

    Raises:
        UnknownNameError: no such compressor; the message suggests the nearest.
        InputError: an option that the compressor does not have.
    """
    return make("compressor", available(), name, options)


def __getattr__(name: str) -> Any:
    for compressor in available().values():
        if compressor.__name__ == name:
            return compressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(compressor.__name__ for compressor in available().values())])
