"""longfit: an input of any length for any Hugging Face causal LM, within one memory budget."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longfit.budget import MemoryBudget, ModelShape, Plan, plan
    from longfit.compressors import KVCompressor
    from longfit.loading import load
    from longfit.memory import Memory
    from longfit.model import unwrap, wrap
    from longfit.report import FitReport

__version__ = "0.1.0"

__all__ = [
    "FitReport",
    "KVCompressor",
    "Memory",
    "MemoryBudget",
    "ModelShape",
    "Plan",
    "load",
    "plan",
    "unwrap",
    "wrap",
]

# torch and transformers take seconds to import: `longfit --help` should not wait for them.
_HOMES = {
    "FitReport": "report",
    "KVCompressor": "compressors",
    "Memory": "memory",
    "MemoryBudget": "budget",
    "ModelShape": "budget",
    "Plan": "budget",
    "load": "loading",
    "plan": "budget",
    "unwrap": "model",
    "wrap": "model",
}
_PARTS = ("attention", "bench", "budget", "cache", "compressors", "docqa", "errors", "eval")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"longfit.{_HOMES[name]}"), name)
    if name in _PARTS:
        return importlib.import_module(f"longfit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS])
