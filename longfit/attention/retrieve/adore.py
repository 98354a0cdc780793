"""ADORE: tokens are released for real, and the needed ones are rebuilt from their ids."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.controller import Controller, ShortKeys
from longfit.attention.in_order import attend_in_order
from longfit.cache import CERTAIN, FULL, GROWTH, GROWTH_SLOTS, SINK, appended, layer_types
from longfit.errors import InputError, ScoreError, UnsupportedFeatureError, UnsupportedModelError

IDS = "token_ids"


@dataclass
class Adore(AttentionPatch):
    """Keeps the keys and values of few tokens, the same in all layers; the rest cost their ids, until needed again.

    After Zhang et al. 2024, "Efficient Sparse Attention needs Adaptive Token Release" (ADORE). A controller says how
    much each token so far matters to the next one. The `kept_tokens` that matter most are kept. With the next token
    the `rebuilt_tokens` released ones that matter most are forwarded again, at their own positions: each attends to
    what is kept before it and to those of them before it, so their keys and values are anew in every layer for this
    step, and enter the cache where they rank among the kept, others being released in exchange.

    Deviations. No code or weights were published: the paper trains a GRU and fine-tunes the model with it; here the
    controller is `ShortKeys`, which needs no training, or any other `Controller`. The first and the last tokens stay
    (`sink_tokens`, `recent_tokens`). The prompt streams: it is released from after each chunk, and only its last tokens
    (`asking_tokens`) are forwarded with rebuilt ones, like every decoded token. A rebuilt token sees what is kept, not
    all that it saw at first, so what comes back is not exactly what was released, unless nothing before it is missing.

    Refused by name: compressors beside it (they choose for each layer), packed positions, embeddings in place of ids,
    and models with sliding layers (which hold nothing that a token from before their window could attend to).

    Attributes (options):
        kept_tokens: tokens that stay, if the budget does not hold fewer.
        rebuilt_tokens: released tokens that a step forwards again; 0 releases for good.
        asking_tokens: tokens at the end of a prompt (of its last chunk) that are forwarded one by one with rebuilt
            ones, as decoded tokens are; those before them were read without what they may have asked for.
        sink_tokens, recent_tokens: tokens at the start and at the end that stay as far as there is room at all.
        controller: what decides.
    """

    name = "adore"
    source = "Zhang et al. 2024 (ADORE)"
    summary = "the same few tokens in all layers, released ones rebuilt from their ids when needed"
    stores = "released"
    alike_in_chunks = False  # what is released comes back for one token at a time

    kept_tokens: int = 1024
    rebuilt_tokens: int = 32
    asking_tokens: int = 32
    sink_tokens: int = 4
    recent_tokens: int = 64
    controller: Controller = field(default_factory=ShortKeys)

    def __post_init__(self) -> None:
        self._at_least(0, sink_tokens=self.sink_tokens, rebuilt_tokens=self.rebuilt_tokens)
        self._at_least(
            1, kept_tokens=self.kept_tokens, recent_tokens=self.recent_tokens, asking_tokens=self.asking_tokens
        )
        if not isinstance(self.controller, Controller):
            raise InputError(f"{self.name}: controller is a {type(self.controller).__name__}, not a Controller")
        self._layers = 1

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"kept_tokens": read_tokens}

    def bind(self, model: Any) -> None:
        """
        Raises:
            UnsupportedModelError: some layers have a sliding window.
        """
        types, _ = layer_types(model.config)
        if set(types) != {FULL}:
            raise UnsupportedModelError(
                f"{self.name} rebuilds tokens in all layers at once, and {len(types) - types.count(FULL)} of the "
                f"{len(types)} layers of {type(model).__name__} hold a sliding window only: a token from before it has "
                "nothing there to attend to"
            )
        self._layers = len(types)
        self.controller = copy.copy(self.controller)
        self.controller.bind(model)

    def learned(self) -> dict[str, Tensor]:
        return self.controller.learned()

    # -- accounts -------------------------------------------------------------------------------------------------

    def reach(self, layer: int, layers: int) -> int:
        return self.kept_tokens

    def most_kept(self, layer: int, layers: int) -> int:
        return self.kept_tokens

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        """A layer's share of the ids and of what the controller remembers."""
        each = 4 + self.controller.token_bytes(self._layers, kv_heads, query_heads, key_dim)
        slots = tokens + max(GROWTH_SLOTS, tokens // GROWTH) if tokens else 0
        return -(-slots * each // self._layers)

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        """Bytes of the logits of one step with rebuilt tokens, their masks, and the rebuilt tokens in every layer."""
        Q = self.rebuilt_tokens + 1
        rebuilt = Q * self._layers * 2 * kv_heads * key_dim * dtype_bytes
        return 3 * 4 * Q * query_heads * (kept + Q) + rebuilt

    # -- the work -------------------------------------------------------------------------------------------------

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if scene.ids is None:
            raise UnsupportedFeatureError(
                f"{self.name} rebuilds tokens from their ids, and embeddings have none; give input_ids"
            )
        attended = scene.full() if scene.again is None else attend_in_order(scene)
        new, state = _new(scene), scene.part.state
        assert new.ids is not None
        if scene.layer == 0:
            state[IDS] = appended(state.get(IDS), new.ids[:, None].to(torch.int32), scene.first)
        self.controller.observe(new, state)
        return attended

    def stay(self, states: list[dict[str, Tensor]], positions: Tensor, tokens: int, limit: int) -> Tensor:
        importance = self._importance(states, tokens).to(positions.device)[positions]
        importance = torch.where(positions >= tokens - self.recent_tokens, CERTAIN * (positions + 1.0), importance)
        importance = importance.masked_fill(positions < self.sink_tokens, SINK)
        best = importance.topk(min(limit, positions.shape[0])).indices
        return best[positions[best].argsort()]

    def recall(self, states: list[dict[str, Tensor]], positions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        count = min(self.rebuilt_tokens, tokens - positions.shape[0])
        if not count:
            return positions[:0], positions[:0]
        importance = self._importance(states, tokens).to(positions.device)
        places = importance.index_fill(0, positions, float("-inf")).topk(count).indices.sort().values
        return places, states[0][IDS][0, 0, places].long()

    def _importance(self, states: list[dict[str, Tensor]], tokens: int) -> Tensor:
        """What the controller says [tokens].

        Raises:
            ScoreError: it is NaN, or not one number for each token.
        """
        given = self.controller.importance(states, tokens)
        if given.shape != (tokens,) or bool(given.isnan().any()):
            raise ScoreError(
                f"{self.controller!r} has to give one number for each of {tokens:,} tokens; it gave shape "
                f"{tuple(given.shape)}, {int(given.isnan().sum()):,} of them NaN"
            )
        return given


def _new(scene: Scene) -> Scene:
    """The scene of the new tokens alone."""
    if scene.again is None:
        return scene
    assert scene.ids is not None
    start = scene.again.shape[0]
    queries, keys, values = (t[:, :, start:] for t in (scene.queries, scene.keys, scene.values))
    return replace(scene, queries=queries, keys=keys, values=values, ids=scene.ids[:, start:], again=None)
