"""Sliding-window layers of hybrid models: as transformers has them, with three leaks closed."""

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from longfit.cache.rotary import Rotary
from longfit.cache.step import Step


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keeps the last window, not the storage of the whole chunk that it was sliced from; never keeps probe tokens;
    follows the cache when the packed geometry moves rotary positions."""

    def __init__(self, sliding_window: int, step: Step, rotary: Rotary | None) -> None:
        super().__init__(sliding_window=sliding_window)
        self.step = step
        self.rotary = rotary

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        probes = self.step.probe_tokens
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        end = keys.shape[2] - probes
        start = max(0, end - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, start:end].clone(), values[:, :, start:end].clone()
        self.cumulative_length -= probes
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is stored ends at the last column seen; a memory of few slots may be shorter than the window."""
        stored = 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[2]
        return stored + query_length, self.cumulative_length - stored

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def move(self, by: Tensor) -> None:
        """Move the stored keys by `by` [B] rotary positions (the packed geometry re-numbers its tokens)."""
        if self.keys is not None and self.rotary is not None and bool((by != 0).any()):
            B, G, S, _ = self.keys.shape
            self.keys = self.rotary.rotate(self.keys, by.to(self.keys.device).view(B, 1, 1).expand(B, G, S))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.repeat_interleave(repeats, 0)
            self.values = self.values.repeat_interleave(repeats, 0)
