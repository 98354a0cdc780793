"""What learned compressors are trained and measured on."""

from longfit.training.data.episode import EVAL, TRAIN, Episode, Source
from longfit.training.data.sources import sources

__all__ = ["EVAL", "TRAIN", "Episode", "Source", "sources"]
