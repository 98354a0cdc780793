"""Prompt compressors, one file each; importing this package registers them all."""

import importlib
import pkgutil

from longfit.compressors.prompt.base import CompressedText, Kept, PromptCompressor, available

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CompressedText", "Kept", "PromptCompressor", "available"]
