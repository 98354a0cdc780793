"""Moving keys and queries between rotary positions, through the model's own rotary module."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rotary:
    """Rotates vectors by a number of positions, in fp32 angles.

    The model's rotary module gives the cosines and sines and the model's own `apply_rotary_pos_emb` applies them, so
    interleaved, partial and scaled RoPE are right by construction. The attention scaling of YaRN stays on the keys as
    the model put it there; it is divided out of each move.

    Args:
        module: the model's `rotary_emb`.
        modeling: name of the module that defines `apply_rotary_pos_emb` for this model.
        layer_type: the layer type handed to rotary modules that keep one table per type (Gemma 3), else None.
    """

    module: nn.Module
    modeling: str
    layer_type: str | None = None

    @classmethod
    def of(cls, model: nn.Module, layer_type: str = "full_attention") -> "Rotary | None":
        """The rotary embedding of a decoder, or None if it has no `rotary_emb` at its top."""
        module = getattr(model, "rotary_emb", None)
        modeling = type(model).__module__
        if module is None or not hasattr(sys.modules[modeling], "apply_rotary_pos_emb"):
            return None
        takes_type = "layer_type" in inspect.signature(type(module).forward).parameters
        return cls(module, modeling, layer_type if takes_type else None)

    @property
    def attention_scaling(self) -> float:
        if self.layer_type is not None:
            per_type = getattr(self.module, f"{self.layer_type}_attention_scaling", None)
            if per_type is not None:
                return float(per_type)
        return float(getattr(self.module, "attention_scaling", 1.0))

    def tables(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Unscaled cosines and sines, each [N, S, rotary size] in fp32, for `positions` [N, S]."""
        like = torch.empty(1, dtype=torch.float32, device=device)
        arguments: list[Any] = [like, positions.to(device)]
        if self.layer_type is not None:
            arguments.append(self.layer_type)
        cos, sin = self.module(*arguments)
        scale = self.attention_scaling
        return cos.to(device) / scale, sin.to(device) / scale

    def rotate(self, vectors: Tensor, by: Tensor) -> Tensor:
        """Move `vectors` [B, N, S, D] forward by `by` [B, N, S] positions (negative: backward).

        The angles and the arithmetic are fp32; the result has the dtype of `vectors`.
        """
        B, N, S, D = vectors.shape
        if S == 0:
            return vectors
        cos, sin = self.tables(by.reshape(B * N, S), vectors.device)
        flat = vectors.reshape(B * N, 1, S, D).float()
        apply = sys.modules[self.modeling].apply_rotary_pos_emb
        moved = apply(flat[:, :, :1], flat, cos, sin)[1] if S == 1 else apply(flat, flat, cos, sin)[1]
        return moved.to(vectors.dtype).reshape(B, N, S, D)
