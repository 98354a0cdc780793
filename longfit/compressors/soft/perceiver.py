"""A perceiver: a few latents read a segment's embeddings through cross-attention, layer after layer."""

from typing import Any

import torch
from torch import Tensor, nn

from longfit.compressors.soft.cross import CrossAttention, feed_forward


class Perceiver(nn.Module):
    """Latents that attend to token embeddings (not to each other), with feed-forwards between. In fp32.

    Source: LCIRC's code. There the table of positions has as many rows as the model is wide, which no segment may
    exceed; here it has a row for each token of the longest segment.

    Args:
        width: E.
        heads, head_dim: H and D.
        inner: width of the feed-forwards.
        layers: how many.
        latents: K.
        positions: length of the longest segment.
        size: root mean square of the token embeddings, with which the position table starts.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, inner: int, layers: int, latents: int, positions: int, size: float
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.latents = nn.Parameter(torch.randn(latents, width, generator=random))
        self.positions = nn.Parameter(size * torch.randn(positions, width, generator=random))
        self.attentions = nn.ModuleList(
            CrossAttention(width, width, heads, heads, head_dim, norm=nn.LayerNorm, norm_memory=True)
            for _ in range(layers)
        )
        self.forwards = nn.ModuleList(feed_forward(width, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def start(self, rows: int) -> Tensor:
        """The learned latents [B, K, E]."""
        return self.latents.expand(rows, -1, -1)

    def forward(self, latents: Tensor, embeds: Tensor) -> Tensor:
        """Latents [B, K, E] that have read the embeddings [B, n, E] of a segment."""
        placed = embeds.float() + self.positions[: embeds.shape[1]]
        layers: Any = zip(self.attentions, self.forwards, strict=True)
        for attention, forward in layers:
            latents = latents + attention(latents, *attention.project(placed))
            latents = latents + forward(latents)
        latents = self.norm(latents)
        return latents
