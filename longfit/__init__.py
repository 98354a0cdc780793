"""longfit: an input of any length for any Hugging Face causal LM, within one memory budget."""

from longfit import attention, compressors, errors
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
    "attention",
    "compressors",
    "errors",
    "load",
    "plan",
    "unwrap",
    "wrap",
]
