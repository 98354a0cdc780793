"""What decides which tokens a row keeps and which it needs again: the exchangeable part of ADORE."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from longfit.attention.base import Scene
from longfit.cache import appended
from longfit.errors import InputError

PAID, CODES, STEPS = "paid", "short_keys", "short_key_steps"
BLOCK_TOKENS = 4096  # short keys that are widened to numbers at once


class Controller:
    """How much each token so far matters to the next one, whether its keys and values are kept or not.

    All that it remembers of a row it writes into the states of the row's layers, as tensors with a batch of one first:
    they are copied, reordered and counted with the cache. A trained controller has the ids in `scene.ids` and may take
    the model's embedding in `bind`.
    """

    def bind(self, model: Any) -> None:
        """Called once when a model is wrapped."""

    def observe(self, scene: Scene, state: dict[str, Tensor]) -> None:
        """Look at the new tokens of one forward in one layer; `state` is that layer's, of this row.

        The tokens before them, `scene.first` of them, have all been seen once and in order.
        """
        raise NotImplementedError

    def importance(self, states: list[dict[str, Tensor]], tokens: int) -> Tensor:
        """Importance [tokens] in fp32 of all tokens of a row so far; higher is kept, or needed again."""
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """Tensors by name that training changes."""
        return {}

    def token_bytes(self, layers: int, kv_heads: int, query_heads: int, key_dim: int) -> int:
        """Bytes for each token seen, all layers together, with those of the work at hand."""
        return 0


@dataclass
class ShortKeys(Controller):
    """The most attention that any head of a few layers paid a token lately, by 8-bit keys. Needs no training.

    Ours, in place of the paper's GRU. In `watched_layers` layers, spread evenly, the key of each token is remembered
    for good in 8 bits a channel, with one step size for each key/value head. The last `query_tokens` queries of a
    forward are compared with the short keys of all tokens before them. A token's importance is the largest of the
    softmax weights over watched layers, heads and queries, `decay` taken to the power of the query's age: as a
    recurrent controller would, it knows the queries up to the last one and not the next. Neighbours share their
    importance (the mean over `pool_tokens`): a token that is rebuilt alone lacks the words around it.

    The largest weight and not the mean, because few heads retrieve: docs/attention/release.md has both.

    Attributes (options):
        watched_layers, query_tokens, pool_tokens: see above; `pool_tokens` is odd.
        decay: of a weight for each token since; 0 knows the last query only.
    """

    watched_layers: int = 4
    query_tokens: int = 16
    pool_tokens: int = 31
    decay: float = 0.95

    def __post_init__(self) -> None:
        for name in ("watched_layers", "query_tokens", "pool_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"ShortKeys: {name} has to be at least 1, got {getattr(self, name)}")
        if self.pool_tokens % 2 == 0 or not 0 <= self.decay <= 1:
            raise InputError(f"ShortKeys: pool_tokens is odd and decay in [0, 1], got {self.pool_tokens}, {self.decay}")

    def watches(self, layer: int, layers: int) -> bool:
        """Whether the keys of this layer are remembered: the middle one of each of `watched_layers` stretches."""
        count = min(self.watched_layers, layers)
        return layer in {(2 * stretch + 1) * layers // (2 * count) for stretch in range(count)}

    def observe(self, scene: Scene, state: dict[str, Tensor]) -> None:
        if not self.watches(scene.layer, scene.layers):
            return
        before, tokens = scene.first, scene.first + scene.keys.shape[2]
        codes, steps = shortened(scene.keys)
        state[CODES] = appended(state.get(CODES), codes, before)
        state[STEPS] = appended(state.get(STEPS), steps, before)
        state[PAID] = appended(state.get(PAID), torch.zeros_like(steps[:, :1]), before)
        paid = state[PAID][0, 0, :tokens]
        paid *= self.decay ** (tokens - before)
        for age in range(min(self.query_tokens, tokens - before)):
            seen = tokens - age
            query = scene.queries[0, :, tokens - before - 1 - age]
            products = code_products(query, state[CODES][0, :, :seen], state[STEPS][0, :, :seen])
            weights = products.mul_(scene.scaling).softmax(-1).amax(0).mul_(self.decay**age)
            torch.maximum(paid[:seen], weights, out=paid[:seen])

    def importance(self, states: list[dict[str, Tensor]], tokens: int) -> Tensor:
        paid = [state[PAID][0, 0, :tokens] for state in states if PAID in state]
        most = torch.stack([given.to(paid[0].device) for given in paid]).amax(0)
        return avg_pool1d(most[None], self.pool_tokens, 1, self.pool_tokens // 2, count_include_pad=False)[0]

    def token_bytes(self, layers: int, kv_heads: int, query_heads: int, key_dim: int) -> int:
        kept = min(self.watched_layers, layers) * (kv_heads * (key_dim + 4) + 4)
        return kept + 4 * (2 * query_heads + 4)

    def __repr__(self) -> str:
        return f"ShortKeys({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


def shortened(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, G, S, D] as int8 of the same shape, and the size [B, G, S] in fp32 of one step of each key."""
    steps = (keys.float().abs().amax(-1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (keys.float() / steps.unsqueeze(-1)).round_().to(torch.int8), steps


def code_products(query: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """Products [H, S] in fp32 of a query [H, D] with the short keys [G, S, D] and [G, S] of its key/value head."""
    G, S, D = codes.shape
    packed = query.float().view(G, -1, D)
    blocks = [torch.matmul(packed, block.float().mT) for block in codes.split(BLOCK_TOKENS, 1)]
    return torch.cat(blocks, -1).mul_(steps.unsqueeze(1)).view(-1, S)
