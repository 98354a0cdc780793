"""Training of learned compressors: one loop, its data, its losses, and what comes out measured."""

from longfit.training.loop import Trained, run
from longfit.training.recipe import Recipe

__all__ = ["Recipe", "Trained", "run"]
