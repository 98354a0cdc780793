"""SWAN-GPT's layout, as a conversion: layers without positions that see everything, between layers with a window."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.interleaved import InterleavedPatch
from longfit.attention.partial import attend
from longfit.attention.unrotated import check_rotary, own_unrotated, queries_at, stored_unrotated, trained_window


@dataclass
class Swan(InterleavedPatch):
    """The first of every `global_every` layers sees everything, without positions and with attention that sharpens as
    the input grows; the others see a window under the model's own rotary positions.

    Puvvada et al. 2025, "SWAN-GPT: An Efficient and Scalable Approach for Long-Context Language Modeling". No query is
    ever compared by rotary distance with a key beyond the window, so inputs may run past the trained window.

    The paper converts a model by continued pretraining. Without it a model that was trained with rotary positions in
    all its layers does not work in this layout: what this patch gives is the layout to train in, and its untrained
    quality as a baseline.

    Deviations: the paper's formula of the logarithmic scaling was not at hand; queries of global layers are scaled by
    max(1, log(p + 1) / log(L)) at position p, L = `trained_tokens` ("log n scaling", Chiang and Cholak 2022), so that
    nothing changes within the trained window. The attention sinks of the local layers are ours.

    Attributes (options):
        trained_tokens: L; by default the window that the model was made for.
    """

    name = "swan"
    source = "Puvvada et al. 2025 (SWAN-GPT)"
    summary = "NoPE layers that see everything between windowed RoPE layers; needs training, untrained as it is"
    extends = True

    trained_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_tokens is not None:
            self._at_least(2, trained_tokens=self.trained_tokens)

    def bind(self, model: Any) -> None:
        """
        Raises:
            UnsupportedModelError: some layers have no rotary positions to take out.
        """
        check_rotary(self.name, model)
        if self.trained_tokens is None:
            self.trained_tokens = trained_window(model)

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        return key_dim * dtype_bytes / self.global_every if self.global_every else 0.0

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if not self.is_global(scene.layer):
            return super().attend(scene)
        keys, past = stored_unrotated(scene), None
        if keys is not None and scene.stored_values is not None:
            past = keys, scene.stored_values
            scene.read_bytes += keys.numel() * keys.element_size()
            scene.read_bytes += scene.stored_values.numel() * scene.stored_values.element_size()
        queries = queries_at(scene, 0)
        queries = (queries.float() * self.sharpness(scene)[:, None]).to(queries.dtype)
        return attend(queries, own_unrotated(scene), scene.values, past, scene.scaling, scene.backend)

    def sharpness(self, scene: Scene) -> Tensor:
        """Factors [Q] of the new tokens' queries, by their places in the input."""
        assert self.trained_tokens is not None
        places = torch.arange(scene.queries.shape[2], device=scene.queries.device) + scene.first
        return ((places + 1).float().log() / math.log(self.trained_tokens)).clamp(min=1.0)
