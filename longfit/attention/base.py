"""The contract of attention patches, and their registry.

A patch is one class in one file: it says which keys a query attends to, or how. Finding it for a layer, chunks,
padding, head budgets, what is stored and what is counted are done elsewhere, once, for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from longfit.attention.partial import attend
from longfit.cache import Part
from longfit.errors import InputError
from longfit.registry import make, register

EVERYTHING = 2**40
SLACK = 64  # decoding makes room for a 64th of a layer's limit at a time, see Row.make_room

_REGISTRY: dict[str, type["AttentionPatch"]] = {}


@dataclass
class Scene:
    """One forward of one part of a layer, before the new keys are stored.

    A part's rows have no padding and its heads hold as many entries each. B rows, H query heads, G key/value heads,
    Q new tokens, n stored entries in ascending order of position, D head size.

    Attributes:
        queries: [B, H, Q, D], rotated as the model rotates them.
        keys, values: the new tokens' own, [B, G, Q, D] and [B, G, Q, Dv].
        stored_keys, stored_values: [B, G, n, D] and [B, G, n, Dv]; None where nothing is stored.
        part: whose entries these are; `part.store.positions` [B, G, n], `part.index` for what the patch keeps.
        first: position of the first new token among the real tokens of its row.
        first_rotary: its rotary position (another one in the packed geometry).
        scaling: factor of the dot products.
        backend: "sdpa", "eager" or "flash_attention_2".
        phase: "prefill" or "decode".
        layer, layers: place of this layer among all layers of the model, and their number.
        rotate: moves vectors [B, N, S, D] by [B, N, S] rotary positions; None for models without RoPE.
        ids: [B, Q] the new tokens' ids; None where the model was given embeddings.
        again: [R] ascending positions of the first R of the Q tokens, which are not new but were released before and
            are forwarded again; None where there are none. `first` is that of the token behind them.
        probe_tokens: how many of the new tokens, at the end, attend but are never stored.
        packed: the geometry, see `Ledger`.
        read_bytes: bytes of stored keys, values and indexes that the patch read; it counts them itself.
        new_scores: what the patch remembers of the new tokens, [B, G, Q] for each of its `score_names`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    stored_keys: Tensor | None
    stored_values: Tensor | None
    part: Part
    first: int
    first_rotary: int
    scaling: float
    backend: str
    phase: str
    layer: int
    layers: int
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    ids: Tensor | None = None
    again: Tensor | None = None
    probe_tokens: int = 0
    packed: bool = False
    read_bytes: int = field(default=0)
    new_scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stored(self) -> int:
        """n."""
        return 0 if self.stored_keys is None else self.stored_keys.shape[2]

    @property
    def positions(self) -> Tensor | None:
        """Positions [B, G, n] of the stored entries among the real tokens of their row."""
        return None if self.part.store is None else self.part.store.positions

    @property
    def group(self) -> int:
        """Query heads that read one key/value head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def full(self) -> tuple[Tensor, Tensor]:
        """Full attention: out [B, H, Q, Dv] and log-sum-exp [B, H, Q] in fp32."""
        past = None
        if self.stored_keys is not None and self.stored_values is not None:
            past = self.stored_keys, self.stored_values
            self.read_bytes += _bytes(self.stored_keys) + _bytes(self.stored_values)
        return attend(self.queries, self.keys, self.values, past, self.scaling, self.backend)


@dataclass
class AttentionPatch:
    """Base of every attention that stands in for full attention in a model's full-attention layers.

    Declarations (class attributes):
        name: what users type; a class with a name is registered.
        source: paper or origin.
        summary: one line for lists and tables.
        phases: where it differs from full attention: "prefill", "decode" or both.
        extends: no query is ever compared with a key farther away than the model was trained for, so that inputs past
            the model's window keep their original positions.
        stores: "everything"; "reachable": what no later query can attend to is dropped; "offloaded": it goes to a
            slow tier (see `longfit.attention.offload`); or "released": the patch itself says which tokens stay, the
            same in all layers, and which of the others are forwarded again (`stay`, `recall`); it has `asking_tokens`,
            at the end of a prompt, that are read one by one as decoded tokens are.
        score_names: what the patch remembers per stored entry, in fp32; see `Scene.new_scores`.
        alike_in_chunks: tokens that are read as a chunk attend to what they would attend to one by one.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    extends: ClassVar[bool] = False
    stores: ClassVar[str] = "everything"
    score_names: ClassVar[tuple[str, ...]] = ()
    alike_in_chunks: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register("attention", _REGISTRY, cls)

    # -- what a patch writes --------------------------------------------------------------------------------------

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Attention of the new tokens: out [B, H, Q, Dv], log-sum-exp [B, H, Q] in fp32 over what was attended to.

        Called in the patch's phases only. Every query attends to its own key at least.
        """
        raise NotImplementedError

    def covers(self, layer: int, layers: int) -> bool:
        """Whether the patch stands in at this layer, counted among all layers of the model; else attention is full."""
        return True

    def reach(self, layer: int, layers: int) -> int | None:
        """The most stored entries that any one later query may attend to; None: all of them."""
        return None

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor | None:
        """Which entries at `positions` [B, G, S] a query at position `seen` or later may attend to; None: all."""
        return None

    def still_reachable(
        self, positions: Tensor, seen: int, layer: int, layers: int, state: dict[str, Tensor]
    ) -> Tensor | None:
        """The same for a patch whose choice is not by position alone: `state` is what it wrote to `part.state`."""
        return self.reachable(positions, seen, layer, layers)

    def stay(self, states: list[dict[str, Tensor]], positions: Tensor, tokens: int, limit: int) -> Tensor:
        """Which `limit` of the stored tokens of a row stay, where the patch releases: indices into `positions` [n], in
        ascending order of position. `states` are the row's, layer by layer: what the patch wrote to `part.state`;
        `tokens` have been seen.
        """
        raise NotImplementedError

    def recall(self, states: list[dict[str, Tensor]], positions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Released tokens of a row that are forwarded again together with its next one, while `positions` [n] are
        stored: their positions [R], ascending, and their ids [R]."""
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """Tensors by name that training changes, besides the options: a memory made with other values is refused."""
        return {}

    def bind(self, model: Any) -> None:
        """Called once when a model is wrapped, for what the patch needs of it or cannot work with.

        Raises:
            UnsupportedModelError: the patch cannot work with this model.
        """

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        """The options with which a decoded token attends to `read_tokens` stored entries at most.

        Raises:
            InputError: the patch has no such option.
        """
        raise InputError(f"{cls.name} has no size in tokens read; give its options instead of read_tokens")

    def entry_bytes(self, key_dim: int, dtype_bytes: int) -> float:
        """Bytes of index per key/value head and stored entry."""
        return 0.0

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        """Bytes that each layer holds for a row of `tokens` tokens beside its entries."""
        return 0

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        """Bytes that attention of one row's chunk allocates at once beyond what full attention does."""
        return 0

    # -- what follows from it -------------------------------------------------------------------------------------

    def most_kept(self, layer: int, layers: int) -> int:
        """Entries that a layer holds between forwards at most: the reach, and room for decoding to run on in."""
        reach = self.reach(layer, layers)
        return EVERYTHING if reach is None else -(-reach * SLACK // (SLACK - 1)) + 2

    def _at_least(self, minimum: int, **options: float) -> None:
        for option, value in options.items():
            if value < minimum:
                raise InputError(f"{self.name}: {option} has to be at least {minimum}, got {value}")

    def options(self) -> dict[str, Any]:
        """The patch's options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def available() -> dict[str, type[AttentionPatch]]:
    """All registered attention patches by name."""
    return dict(sorted(_REGISTRY.items()))


def get(name: str, **options: Any) -> AttentionPatch:
    """The attention patch `name` with its options.

    Raises:
        UnknownNameError: no such patch; the message suggests the nearest.
        InputError: an option that the patch does not have.
    """
    return make("attention", _REGISTRY, name, options)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
