"""Embeddings of stretches of a text from a causal LM's own hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longfit.compressors.prompt.lm import LanguageModel


def contextual(lm: LanguageModel, units: Sequence[Sequence[int]]) -> Tensor:
    """Means [N, E] of the final hidden states of each unit's tokens, the text read as one.

    A causal LM sees a quarter of a stretch of text before each stretch, and so every token but the first few has its
    context. Only the sums are held.
    """
    ids = [token for unit in units for token in unit]
    sizes = torch.tensor([len(unit) for unit in units], device=lm.device)
    owner = torch.arange(len(units), device=lm.device).repeat_interleave(sizes)
    sums: Tensor | None = None
    for start, hidden in lm.stretches(ids, lm.opening):
        if sums is None:
            sums = torch.zeros(len(units), hidden.shape[1], device=lm.device)
        sums.index_add_(0, owner[start : start + hidden.shape[0]], hidden.float())
    if sums is None:
        return torch.zeros(len(units), 1)
    return sums / sizes.clamp(min=1)[:, None]


def centred(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors [N, E] of embeddings less what all have in common: a causal LM's hidden states share a direction
    that would make all of them alike."""
    return torch.nn.functional.normalize(embeddings - mean, dim=-1)
