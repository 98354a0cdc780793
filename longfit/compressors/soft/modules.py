"""The small trained parts that learned compressors share: slot embeddings and projectors, all in fp32."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


def rms(vectors: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept, in fp32."""
    return vectors.float().square().mean(-1, keepdim=True).add(1e-12).sqrt()


class SlotEmbedding(nn.Module):
    """Vectors that stand in for tokens; never rows of the vocabulary (no tied head, no new output classes).

    Args:
        rows: how many.
        like: [N, E] embeddings whose mean and spread they start with.
        start: "mean" (the mean embedding plus a little noise), "normal" (the embeddings' spread) or a [E] vector.
    """

    def __init__(self, rows: int, like: Tensor, start: str | Tensor = "mean") -> None:
        super().__init__()
        table = like.detach().float()
        noise = torch.randn(rows, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
        if isinstance(start, Tensor):
            first = start.detach().float().expand(rows, -1) + 0.02 * table.std() * noise
        elif start == "mean":
            first = table.mean(0).expand(rows, -1) + 0.1 * table.std() * noise
        else:
            first = table.std() * noise
        self.weight = nn.Parameter(first.clone())

    def forward(self, batch: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """[B, N, E]: the rows asked for (all of them if left out), once for each of the batch."""
        chosen = self.weight if rows is None else self.weight[rows]
        return chosen.to(dtype)[None].expand(batch, -1, -1)


class RmsMatch(nn.Module):
    """Hidden states brought to the size of input embeddings: `gain * h / rms(h)`, with one gain a channel.

    Args:
        width: E.
        size: root mean square of the embeddings, where every gain starts.
    """

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), float(size)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] in the dtype of `hidden`."""
        return (self.gain * hidden.float() / rms(hidden)).to(hidden.dtype)


class Projector(nn.Module):
    """From the hidden states of an encoder to input embeddings, matched in size.

    Hidden states after the final norm are an order of magnitude larger than embeddings (53 against 3.2 on
    SmolLM2-135M), so a plain linear map starts far off. Here `out = residual + scale * (W h / rms(h))`, where W starts
    at zero with a residual and as the identity (or orthogonal, between widths) without one, and `scale` at the size of
    the reader's embeddings.

    Args:
        width_in, width_out: E of the encoder and of the reader.
        size: root mean square of the reader's embeddings.
        hidden: width of a layer in between (ARC's two linear maps without an activation); None for one map.
        zero: start at zero, where a residual is added.
    """

    def __init__(
        self, width_in: int, width_out: int, size: float, hidden: int | None = None, zero: bool = False
    ) -> None:
        super().__init__()
        sizes = [width_in, *([hidden] if hidden else []), width_out]
        self.maps = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.scale = nn.Parameter(torch.tensor([float(size)]))  # FSDP shards no scalar
        for a, b, layer in zip(sizes, sizes[1:], self.maps, strict=False):
            weight = cast(Tensor, layer.weight)
            nn.init.orthogonal_(weight) if a != b else nn.init.eye_(weight)
        if zero:
            nn.init.zeros_(cast(Tensor, self.maps[-1].weight))

    @torch.no_grad()
    def fit(self, hidden: Tensor, wanted: Tensor, ridge: float = 1e-3) -> None:
        """Become the linear map that takes `hidden` [N, Ein] nearest to `wanted` [N, Eout], without a residual.

        Least squares with a ridge of so much of the mean square. Two maps share the singular values; where the layer
        between them is narrower, the smallest are lost.
        """
        given = (hidden.float() / rms(hidden)).double()
        square = given.T @ given
        square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
        whole = torch.linalg.solve(square, given.T @ wanted.double()).T / float(self.scale)  # [Eout, Ein]
        if len(self.maps) == 1:
            parts = [whole]
        else:
            left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
            k = min(len(sizes), cast(Tensor, self.maps[0].weight).shape[0])
            roots = sizes[:k].sqrt()
            parts = [roots[:, None] * right[:k], left[:, :k] * roots]
        for layer, part in zip(self.maps, parts, strict=True):
            weight = cast(Tensor, layer.weight)
            weight.zero_()[: part.shape[0], : part.shape[1]] = part.to(weight.dtype)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., E] in the dtype of `residual`, or of `hidden` where there is none."""
        out = hidden.float() / rms(hidden)
        for layer in self.maps:
            out = layer(out)
        out = self.scale * out
        return out.to(hidden.dtype) if residual is None else (residual.float() + out).to(residual.dtype)
