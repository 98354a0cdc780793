"""Learned compressors, one file each; importing this package registers them all."""

import importlib
import pkgutil

from longfit.compressors.soft.base import LearnedCompressor, available
from longfit.compressors.soft.encoded import Encoded, Entries

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Encoded", "Entries", "LearnedCompressor", "available"]
