"""Knorm: keys of small norm are the ones that get attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_last


@dataclass
class Knorm(KVCompressor):
    """Knorm: score = -||k|| (Devoto et al., EMNLP 2024, arXiv:2406.11430). In fp32, because bf16 norms tie.

    Args:
        recent_tokens: most recent tokens that always stay; the paper keeps none apart.
    """

    name = "knorm"
    source = "arXiv:2406.11430"
    summary = "keeps the keys of smallest norm"

    recent_tokens: int = 0

    @property
    def min_tokens(self) -> int:
        return self.recent_tokens + 1

    def score(self, view: View) -> Tensor:
        return keep_last(-torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32), self.recent_tokens)
