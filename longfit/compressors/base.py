"""The contract of KV-cache compressors, and their registry.

A method is one class in one file: it declares what it needs and writes `score()`. Finding it, cutting the chunk into
candidates, choosing, gathering, positions, padding, batches and budgets are done elsewhere, once, for all.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from longfit.cache import SINK, View
from longfit.errors import BudgetError, InputError
from longfit.registry import make, register

_REGISTRY: dict[str, type["KVCompressor"]] = {}


@dataclass
class KVCompressor:
    """Base of every method that keeps some keys and values and drops the others.

    Declarations (class attributes):
        name: what users type; a class with a name is registered.
        source: paper or origin.
        summary: one line for lists and tables.
        needs_queries: scores with the model's real queries (`window_tokens` of them, or the question's).
        observes: `observe()` is called for every forward, with all its queries.
        query_aware: scores with the question where it is known (`generate(..., question_tokens=n)`).
        persists: what `score()` said during prefill decides during decoding; new tokens are safe until room runs out.
        replays: the chunk is read a second time to score it, and the whole cache is trimmed together afterwards.
        ragged: heads keep different numbers of entries.
        geometry: "original" positions with holes, or "packed" ones, numbered anew.
        score_names: per-entry fp32 state that moves with the entries.
        state_names: what `observe()` writes into `view.state`: tensors [B], or [B, H, ...] with the query heads second.
        phases: when the method itself scores.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs_queries: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    query_aware: ClassVar[bool] = False
    persists: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    geometry: ClassVar[str] = "original"
    score_names: ClassVar[tuple[str, ...]] = ()
    state_names: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register("compressor", _REGISTRY, cls)

    # -- what a method writes -------------------------------------------------------------------------------------

    def score(self, view: View) -> Tensor:
        """Importance [B, G, S] of every candidate; higher is kept, +inf must be kept, NaN is an error."""
        raise NotImplementedError

    def observe(self, view: View) -> None:
        """Look at a forward right after its attention (only if `observes`); may write `view.scores`, `view.state`."""

    def select(self, views: list[View], scores: list[Tensor], n_keep: int) -> list[Tensor]:
        """Indices [B, G, N] to keep in each part: the highest `n_keep` of each head."""
        return [given.topk(n_keep, dim=-1).indices for given in scores]

    def layer_limit(self, kept_tokens: int, total: int, layer: int, layers: int) -> int:
        """Entries that a layer may keep when each may keep `kept_tokens` on average."""
        return kept_tokens

    # -- what a method's options imply ----------------------------------------------------------------------------

    @property
    def window_tokens(self) -> int:
        """Last queries that each layer remembers for `score()`."""
        return 0

    @property
    def min_tokens(self) -> int:
        """The fewest entries per layer with which the method can work (sinks and window)."""
        return 1

    @property
    def entry_state_bytes(self) -> int:
        """Bytes of state per key/value head and entry."""
        return 4 * (len(self.score_names) + self.persists)

    def layer_state_bytes(self, query_heads: int, head_dim: int, dtype_bytes: int) -> int:
        """Bytes of state per layer and row that do not grow with the entries."""
        return query_heads * self.window_tokens * head_dim * dtype_bytes + 8 * self.window_tokens

    def score_workspace(self, query_heads: int, kv_heads: int, head_dim: int, chunk: int, kept: int) -> int:
        """Bytes that scoring one layer of one row allocates at once, at most."""
        return 4 * 3 * query_heads * self.window_tokens * (chunk + kept) + 4 * 4 * kv_heads * (chunk + kept)

    def bind(self, model: Any) -> None:
        """Called once when a model is wrapped; a method that needs something of it takes it here."""

    def _at_least(self, minimum: int, **options: float) -> None:
        for option, value in options.items():
            if value < minimum:
                raise InputError(f"{self.name}: {option} has to be at least {minimum}, got {value}")

    def options(self) -> dict[str, Any]:
        """The method's options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class KeepAll(KVCompressor):
    """Drops nothing but what the attention can never look at again: what a patch without a compressor runs on."""

    def score(self, view: View) -> Tensor:
        return torch.zeros(view.positions.shape, device=view.positions.device)

    def select(self, views: list[View], scores: list[Tensor], n_keep: int) -> list[Tensor]:
        """
        Raises:
            BudgetError: entries that are still needed do not fit.
        """
        needed = max(int((given >= 0).sum(-1).max()) for given in scores)  # what is not needed any more ranks below 0
        if needed > n_keep:
            raise BudgetError(
                f"the attention looks at up to {needed:,} stored tokens a layer and the budget holds {n_keep:,}; raise "
                "the budget, or name a compressor that chooses among them"
            )
        return super().select(views, scores, n_keep)


@dataclass
class Wrapper(KVCompressor):
    """Base of methods that choose differently around any scorer."""

    scorer: KVCompressor | str = "snapkv"

    def __post_init__(self) -> None:
        inner = get(self.scorer) if isinstance(self.scorer, str) else self.scorer
        if inner.ragged or inner.replays or isinstance(inner, Wrapper):
            raise InputError(f"{self.name} wraps a plain scorer, not {inner.name}")
        self.scorer = inner


def _of_scorer(attribute: str) -> property:
    return property(lambda self: getattr(self.scorer, attribute), doc=f"The scorer's `{attribute}`.")


for _attribute in (
    "needs_queries",
    "observes",
    "query_aware",
    "persists",
    "score_names",
    "state_names",
    "window_tokens",
    "min_tokens",
    "entry_state_bytes",
    "layer_state_bytes",
    "score_workspace",
    "score",
    "observe",
):
    setattr(Wrapper, _attribute, _of_scorer(_attribute))


def available() -> dict[str, type[KVCompressor]]:
    """All registered compressors by name."""
    return dict(sorted(_REGISTRY.items()))


def get(name: str, **options: Any) -> KVCompressor:
    """The compressor `name` with its options.

    Raises:
        UnknownNameError: no such compressor; the message suggests the nearest.
        InputError: an option that the compressor does not have.
    """
    return make("compressor", _REGISTRY, name, options)


def value_norms(view: View) -> Tensor:
    """Euclidean norms [B, G, S] of the values, in fp32."""
    return torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)


def keep_sinks(scores: Tensor, view: View, sink_tokens: int) -> Tensor:
    """`scores` with the first `sink_tokens` of each row above everything else."""
    return scores.masked_fill(view.positions < sink_tokens, SINK)


def keep_last(scores: Tensor, tokens: int) -> Tensor:
    """`scores` [B, G, S] with the last `tokens` candidates marked as not to be dropped."""
    if tokens:
        scores[..., -tokens:] = float("inf")
    return scores
