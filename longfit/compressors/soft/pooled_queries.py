"""One layer of a causal LM with fewer queries than keys: the queries are means, the keys are what they always were."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


def group_weights(tokens: int, groups: int, width: int) -> Tensor:
    """[groups, width] that averages consecutive near-equal groups of the first `tokens` of `width` tokens.

    The longer groups come first. With fewer tokens than groups, tokens serve several groups.
    """
    if tokens >= groups:
        small, longer = divmod(tokens, groups)
        sizes = torch.tensor([small + 1] * longer + [small] * (groups - longer))
        owner = torch.repeat_interleave(torch.arange(groups), sizes)
        weights = torch.zeros(groups, width)
        weights[owner, torch.arange(tokens)] = 1.0 / sizes[owner].float()
        return weights
    weights = torch.zeros(groups, width)
    weights[torch.arange(groups), torch.arange(groups) * tokens // groups] = 1.0
    return weights


class _Got(Exception):
    """Ends a layer as soon as its keys and values are there."""


class _Capture(Cache):
    """A cache that takes the keys and values [B, G, n, D] of one layer and ends it."""

    def __init__(self) -> None:
        self.got: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.got = key_states, value_states
        raise _Got


class _Give(Cache):
    """A cache that answers with the keys and values it was made of, whatever it is told."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def with_cache(arguments: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """A layer's arguments with another cache, under whatever name the family has for it."""
    return {name: cache if isinstance(value, Cache) else value for name, value in arguments.items()}


def run_pooled(
    layer: nn.Module,
    arguments: dict[str, Any],
    hidden: Tensor,
    weights: Tensor,
    seen: Tensor,
    additive: bool,
) -> Tensor:
    """What the layer makes of pooled queries, [B, m, E].

    The means of `hidden` are queries and residual, at rotary positions 0 to m - 1; keys and values come from `hidden`
    itself, at 0 to n - 1.

    Args:
        layer: a decoder layer.
        arguments: what it would have run with on `hidden` (`Pass.stopped`), with position tables of n tokens.
        hidden: [B, n, E] what enters it, n >= m.
        weights: [B, m, n] how the queries are pooled.
        seen: bool [B, n] keys that are no padding.
        additive: whether the model's attention wants masks that are added (eager).
    """
    capture, m = _Capture(), weights.shape[1]
    with suppress(_Got):
        layer(hidden, **with_cache(arguments, capture))
    assert capture.got is not None
    pooled = (weights.to(hidden.device) @ hidden.float()).to(hidden.dtype)
    mask = seen[:, None, None].expand(-1, 1, m, -1)
    if additive:
        added = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        mask = added.masked_fill(~mask, torch.finfo(hidden.dtype).min)
    changed: dict[str, Any] = {"attention_mask": mask}
    if arguments.get("position_embeddings") is not None:
        changed["position_embeddings"] = tuple(table[:, :m] for table in arguments["position_embeddings"])
    if arguments.get("position_ids") is not None:
        changed["position_ids"] = arguments["position_ids"][:, :m]
    out = layer(pooled, **{**with_cache(arguments, _Give(*capture.got)), **changed})
    return out[0] if isinstance(out, tuple) else out
