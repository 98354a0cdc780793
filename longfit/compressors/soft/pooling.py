"""Attention pooling: learned queries gather what a variable number of states say (Set Transformer's PMA)."""

import torch
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """Learned queries attend to states, then a feed-forward, each with a residual and layer norm after it. In fp32.

    Source: Lee et al. 2019, "Set Transformer", equations 6 and 11 without the row-wise layer on the states; E2LLM's
    vPMA.

    Args:
        width: of the states.
        heads: attention heads; divides `width`.
        queries: how many vectors come out.
    """

    def __init__(self, width: int, heads: int, queries: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.seeds = nn.Parameter(torch.empty(queries, width))
        nn.init.xavier_uniform_(self.seeds)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.after_attention, self.after_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.forward_in, self.forward_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """[N, queries, width] from states [N, T, width], of which bool `seen` [N, T] count."""
        states = states.float()
        seeds = self.seeds.expand(states.shape[0], -1, -1)
        query, keys, values = (self._split(part) for part in (self.query(seeds), self.key(states), self.value(states)))
        gathered = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None, None])
        pooled = self.after_attention(seeds + self.out(gathered.transpose(1, 2).flatten(2)))
        return self.after_forward(pooled + self.forward_out(nn.functional.gelu(self.forward_in(pooled))))

    def _split(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)
