"""What a compressor sees of a layer when it scores the layer's entries."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longfit.cache.products import dot_products

QUERY_BLOCK = 64  # so that a block of scores stays in a core's cache


@dataclass
class View:
    """The candidates of one part of a layer, and the queries that looked at them.

    A part is a set of rows and key/value heads whose entries are counted alike, so there is no padding here: every
    slot is a real token. B rows, G key/value heads, H query heads, S candidates in ascending order of position,
    W remembered queries, P probe tokens (tokens that attend but cannot be kept), D head size.

    Attributes:
        keys: [B, G, S, D], rotated as the attention used them.
        values: [B, G, S, Dv].
        positions: [B, G, S] place of each candidate among the real tokens of its row.
        new: how many of the candidates, at the end of S, came with this forward.
        queries: [B, H, W, D] the last queries (the question's, where it is known), or None.
        query_positions: [W] their places.
        probe_keys: [B, G, P, D] keys that compete for the queries' attention and cannot be kept, or None.
        all_queries: [B, H, Q, D] every query of this forward, probes included; None when room is made before decoding.
        all_query_positions: [Q].
        log_sum_exp: [B, H, Q] of the scaled scores of `all_queries` over candidates and probes.
        scaling: factor of the dot products.
        n_keep: entries to keep for each key/value head, on average.
        seen: real tokens of the row so far.
        next_position: rotary position of the token that comes after the candidates.
        first_head: place of the first of the G heads in the layer.
        layer, layers: index of this compressible layer and their number.
        phase: "prefill" or "decode".
        scores: the method's per-entry state [B, G, S] by name; writing into it is remembered.
        state: the method's running state of this part by name, batch first.
        rotate: moves vectors [B, N, S, D] by [B, N, S] rotary positions; None for models without RoPE.
        protected: how many of the last candidates are the question's and must stay.
        replayed: how many of the last candidates the probes of this forward replay (KVzip).
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    new: int
    queries: Tensor | None
    query_positions: Tensor | None
    scaling: float
    n_keep: int
    seen: int
    next_position: int
    layer: int
    layers: int
    phase: str
    first_head: int = 0
    scores: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    protected: int = 0
    replayed: int = 0
    probe_keys: Tensor | None = None
    all_queries: Tensor | None = None
    all_query_positions: Tensor | None = None
    log_sum_exp: Tensor | None = None

    @property
    def size(self) -> int:
        """S, the number of candidates of each head."""
        return self.keys.shape[2]

    @property
    def rotary_positions(self) -> Tensor:
        """[Q] rotary positions of `all_queries`."""
        assert self.all_queries is not None
        first = self.next_position - self.new
        return torch.arange(first, first + self.all_queries.shape[2], device=self.keys.device)

    def window_attention(self, window_tokens: int | None = None) -> Tensor:
        """Softmax attention of the last `window_tokens` remembered queries (all if None) over the candidates.

        Returns [B, G, H // G, W, S] in fp32. Probe keys take their share of the softmax and are then left out.
        """
        assert self.queries is not None and self.query_positions is not None
        w = self.queries.shape[2] if window_tokens is None else min(window_tokens, self.queries.shape[2])
        queries, places = self.queries[:, :, -w:], self.query_positions[-w:]
        logits = self._logits(queries, self.keys, self.positions, places)
        if self.probe_keys is None:
            return logits.softmax(-1)
        first_probe = self.seen
        P = self.probe_keys.shape[2]
        probe_places = torch.arange(first_probe, first_probe + P, device=places.device).expand(
            *self.positions.shape[:2], P
        )
        probes = self._logits(queries, self.probe_keys, probe_places, places)
        return torch.cat([logits, probes], -1).softmax(-1)[..., : self.size]

    def column_mass(self) -> Tensor:
        """Attention that each candidate received from every query of this forward, summed over queries.

        Returns [B, G, H // G, S] in fp32. Works block by block from the log-sum-exp that the attention kernel gave, so
        the attention matrix of the chunk never exists.
        """
        assert self.all_queries is not None and self.log_sum_exp is not None
        B, H, Q, D = self.all_queries.shape
        G, S = self.keys.shape[1:3]
        stored = S - self.new
        mass = torch.zeros(B, G, H // G, S, dtype=torch.float32, device=self.keys.device)
        for start in range(0, Q, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, Q)
            visible = min(S, stored + stop)  # what comes after the block's last query is in its future
            packed = self.all_queries[:, :, start:stop].reshape(B, G, -1, D)
            normaliser = self.log_sum_exp[:, :, start:stop].reshape(B, G, -1, 1)
            seen = self.keys[:, :, :visible]
            logits = dot_products(packed, seen) if Q == 1 else torch.matmul(packed, seen.mT)
            # One pass for what would be three: scale, widen to fp32, normalise.
            weights = torch.add(normaliser.neg(), logits, alpha=self.scaling).view(B, G, H // G, stop - start, visible)
            own = torch.arange(min(stored + start, visible), visible, device=weights.device)
            later = own[None] > torch.arange(stored + start, stored + stop, device=weights.device)[:, None]
            weights[..., visible - own.shape[0] :].masked_fill_(later, float("-inf"))
            mass[..., :visible] += weights.exp_().sum(-2)
        return mass

    def _logits(self, queries: Tensor, keys: Tensor, key_places: Tensor, query_places: Tensor) -> Tensor:
        """Scaled causal scores [B, G, H // G, W, S] in fp32, minus infinity where the key lies after the query."""
        B, H, W, D = queries.shape
        G, S = keys.shape[1:3]
        packed = queries.reshape(B, G, H // G * W, D)
        logits = torch.matmul(packed, keys.mT).float().mul_(self.scaling).view(B, G, H // G, W, S)
        if int(key_places[:, :, -1].max()) > int(query_places[0]):
            hidden = key_places[:, :, None, None, :] > query_places[None, None, None, :, None]
            logits.masked_fill_(hidden, float("-inf"))
        return logits
