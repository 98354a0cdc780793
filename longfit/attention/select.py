"""Sparse attention while decoding: everything is kept, and each step reads the few entries that matter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention import kernels
from longfit.attention.base import AttentionPatch, Scene
from longfit.errors import InputError


@dataclass
class SelectingPatch(AttentionPatch):
    """Base of the selectors. A method writes `estimate`: how much each stored entry would matter to the query.

    Attributes (options of every selector):
        top_tokens: stored entries that a step attends to, beside the new token itself.
        dense_layers: the first layers of the model that stay full.
        sink_tokens, recent_tokens: entries at the start and at the end that are always among the `top_tokens`.
        share: "head", each query head chooses its own entries, or "group": the heads that read one key/value head
            choose together (by the largest of their estimates), which reads each entry once.
    """

    phases = ("decode",)
    alike_in_chunks = False

    top_tokens: int = 128
    dense_layers: int = 2
    sink_tokens: int = 0
    recent_tokens: int = 0
    share: str = "head"

    def __post_init__(self) -> None:
        self._at_least(1, top_tokens=self.top_tokens)
        self._at_least(
            0, dense_layers=self.dense_layers, sink_tokens=self.sink_tokens, recent_tokens=self.recent_tokens
        )
        if self.sink_tokens + self.recent_tokens > self.top_tokens:
            raise InputError(
                f"{self.name}: {self.sink_tokens} sinks and {self.recent_tokens} recent tokens are more than "
                f"top_tokens={self.top_tokens}"
            )
        if self.share not in ("head", "group"):
            raise InputError(f'{self.name}: share={self.share!r}; it is "head" or "group"')

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"top_tokens": read_tokens}

    def covers(self, layer: int, layers: int) -> bool:
        return layer >= self.dense_layers

    def estimate(self, scene: Scene) -> Tensor:
        """How much each stored entry would matter, [B, G, H // G, n]; higher is attended to. Counts what it reads."""
        raise NotImplementedError

    def choose(self, scene: Scene) -> Tensor:
        """Slots [B, H or G, k] of the entries to attend to."""
        scores = self.estimate(scene)
        if self.share == "group":
            scores = scores.amax(2)
        scores = scores.reshape(scores.shape[0], -1, scene.stored)
        if self.sink_tokens:
            scores[..., : self.sink_tokens] = torch.inf
        if self.recent_tokens:
            scores[..., -self.recent_tokens :] = torch.inf
        return kernels.select_top(scores, self.top_tokens)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if scene.queries.shape[2] != 1 or scene.stored <= self.top_tokens:
            return scene.full()
        return attend_selected(scene, self.choose(scene))


def attend_selected(scene: Scene, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one query a head to the entries at `slots` [B, H or G, k] and to its own key.

    Nothing else of the keys and values is read.
    """
    assert scene.stored_keys is not None and scene.stored_values is not None
    stored = scene.stored_keys, scene.stored_values
    scene.read_bytes += sum(slots.numel() * t.shape[-1] * t.element_size() for t in stored)
    return kernels.attend_slots(scene.queries, scene.keys, scene.values, stored, slots, scene.scaling)
