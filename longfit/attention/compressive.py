"""Compressive memory: linear attention over what was absorbed, in a matrix of fixed size (Infini-attention, 2.1.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-20


class Compressive(NamedTuple):
    """What a head has absorbed.

    matrix: [B, G, D, Dv], normalizer: [B, G, D], both fp32.
    """

    matrix: Tensor
    normalizer: Tensor

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor) -> "Compressive":
        """Nothing absorbed, for keys [B, G, *, D] and values [B, G, *, Dv]."""
        B, G, _, D = keys.shape
        size = (B, G, D, values.shape[-1])
        return cls(keys.new_zeros(size, dtype=torch.float32), keys.new_zeros(size[:3], dtype=torch.float32))

    def absorb(self, keys: Tensor, values: Tensor, delta_rule: bool, kept: Tensor | None = None) -> "Compressive":
        """A new memory that holds a segment as well (equations 8 to 10).

        Args:
            keys: [B, G, S, D] without rotary positions; values: [B, G, S, Dv].
            delta_rule: store of a value only what the memory does not return for its key already.
            kept: bool [B, G, S], which entries to absorb; None for all.
        """
        features, values = feature_map(keys), values.float()
        if kept is not None:
            features = features * kept.unsqueeze(-1)
        if delta_rule:
            known, _ = self._read(features)
            values = values - known
        return Compressive(self.matrix + features.mT @ values, self.normalizer + features.sum(2))

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values for queries [B, H, Q, D] without rotary positions (equation 7), and how much was found.

        Returns:
            [B, H, Q, Dv] in fp32, zeros where the memory is empty, and the sum of similarities [B, H, Q].
        """
        B, H, Q, D = queries.shape
        G = self.matrix.shape[1]
        found, mass = self._read(feature_map(queries).reshape(B, G, H // G * Q, D))
        return found.reshape(B, H, Q, -1), mass.reshape(B, H, Q)

    def _read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mass = features @ self.normalizer.unsqueeze(-1)
        # Where the normalizer is (next to) nothing there is nothing to return, and no ratio to trust.
        found = torch.where(mass > TINY, features @ self.matrix / mass.clamp(min=TINY), 0.0)
        return found, mass.squeeze(-1)


def feature_map(vectors: Tensor) -> Tensor:
    """ELU + 1, in fp32: positive, so that similarities are."""
    return torch.nn.functional.elu(vectors.float()) + 1.0
