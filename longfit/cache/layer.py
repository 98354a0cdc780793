"""The cache layer that holds the budget."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longfit.cache.hand_over import hand_over, room_beside_pages
from longfit.cache.ledger import ANGLE, Ledger
from longfit.cache.look import Look
from longfit.cache.part import Part
from longfit.cache.rotary import Rotary
from longfit.cache.row import Row
from longfit.cache.step import Step
from longfit.cache.store import Store
from longfit.cache.trim import SCORE
from longfit.errors import UnsupportedFeatureError

HANDLE = "_longfit_layer"


class BoundedLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, trimmed by a compressor right after the layer's attention.

    `update` only takes the new keys and values in hand and tags them with the layer; the attention function finds the
    layer by that tag, attends to what is kept and to the chunk (see `longfit.attention`), and calls `finish`, which
    lets the method score and trims. Between forwards the layer never holds more than its limit.

    The layer reports the columns it has *seen* as its length; its mask sizes describe what is kept.

    `patch` is the attention that stands in for full attention here (see `longfit.attention`), None for full attention;
    `depth` is the layer's place among all layers of the model and their number, `index` that among those of full
    attention.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        count: int,
        method: Any,
        ledger: Ledger,
        step: Step,
        rotary: Rotary | None,
        patch: Any = None,
        depth: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.depth = depth
        self.patch = patch if patch is not None and patch.covers(*depth) else None
        self.index, self.count = index, count
        self.method, self.ledger, self.step, self.rotary = method, ledger, step, rotary
        self.parts: list[Part] = []
        self.seen = 0
        self.chunk: tuple[Tensor, Tensor] | None = None
        self.scaling = 1.0
        self.dropped = 0
        self.score_seconds = 0.0
        self.read_bytes = 0

    # -- what transformers asks of a cache layer ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        B, G = key_states.shape[:2]
        padding = self.ledger.padding or [0] * B
        apart = self.ledger.apart or len(set(padding)) > 1 or self.method.ragged or self.rows_apart
        rows = [slice(b, b + 1) for b in range(B)] if apart else [slice(0, B)]
        heads = [slice(g, g + 1) for g in range(G)] if self.method.ragged else [slice(0, G)]
        self.parts = [Part(r, h, padding[r.start]) for r in rows for h in heads]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys [B, G, Q, D] and values [B, G, Q, Dv] in hand; returns them, the keys tagged."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = key_states.view(key_states.shape)
        setattr(handle, HANDLE, self)
        self.chunk = (key_states, value_states)
        return handle, value_states

    def members(self) -> list[tuple[slice, "BoundedLayer"]]:
        """Which rows of a forward go to which layer: all of them to this one."""
        return [(slice(None), self)]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = max((part.kept for part in self.parts), default=0)
        return kept + query_length, self.seen - kept

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise UnsupportedFeatureError(
                "a cache that drops entries cannot be rolled back, so assisted and speculative decoding do not work "
                "with a compressor; generate without an assistant, or inside `model.disabled()`"
            )

    def reset(self) -> None:
        self.parts, self.seen, self.chunk, self.is_initialized = [], 0, None, False

    def offload(self) -> None:
        raise UnsupportedFeatureError("a bounded cache layer cannot be offloaded; it is small already")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows([row for row in range(self.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self.rows)[indices.cpu()].tolist()
        self._select_rows(rows)

    @property
    def rows(self) -> int:
        return max((part.rows.stop for part in self.parts), default=0)

    def _select_rows(self, sources: list[int]) -> None:
        if len(self.parts) == 1 and not self.rows_apart:
            self.parts = [self.parts[0].select_rows(torch.tensor(sources), slice(0, len(sources)))]
            return
        by_row: dict[int, list[Part]] = {}
        for part in self.parts:
            for row in range(part.rows.start, part.rows.stop):
                by_row.setdefault(row, []).append(part)
        self.parts = [
            part.select_rows(torch.tensor([source - part.rows.start]), slice(row, row + 1))
            for row, source in enumerate(sources)
            for part in by_row[source]
        ]

    # -- accounts -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated by the layer between forwards."""
        return sum(part.nbytes for part in self.parts)

    def kept_by_head(self) -> list[list[int]]:
        """Entries kept on the fast side, [rows][key/value heads]."""
        kept = [[0] * max((p.heads.stop for p in self.parts), default=0) for _ in range(self.rows)]
        for part in self.parts:
            for row in range(part.rows.start, part.rows.stop):
                for head in range(part.heads.start, part.heads.stop):
                    kept[row][head] = part.held
        return kept

    def limit(self, padding: int, seen: int) -> int:
        """Entries that each head of a row may keep, on average, once `seen` columns have passed.

        Where the layer offloads, what the pages brought in may take comes off.

        Raises:
            BudgetError: they leave too little.
        """
        total = max(seen, self.step.total_tokens) - padding
        limit = self.method.layer_limit(self.ledger.kept_limit(total), total, self.index, self.count)
        if self.patch is None:
            return limit
        most = self.patch.most_kept(*self.depth)
        if not self.offloads:
            return min(limit, most)
        whole = self.ledger.keep_ratio == 1.0
        return room_beside_pages(limit, most, self.patch, whole, self.method.min_tokens)

    # -- the work of one forward ----------------------------------------------------------------------------------

    def stored_keys(self, part: Part) -> Tensor | None:
        """The part's kept keys [B, G, n, D] as this forward's queries should see them; None if there are none."""
        if part.store is None or part.store.n == 0:
            return None
        if self.ledger.packed and not self.ledger.frozen:
            assert self.rotary is not None
            return self.rotary.rotate(part.store.keys, self.ledger.places(part))
        return part.store.keys

    def make_room(self) -> None:
        """Before a decoded token is stored: drop a few entries of every row that is full."""
        for row in self._by_row():
            row.make_room()

    def finish(self, looks: list[Look], scaling: float) -> None:
        """Store the chunk, let the method look at it, trim. Called once by the attention function.

        Raises:
            BudgetExceededError: the layer holds more than its limit afterwards.
        """
        assert self.chunk is not None
        keys, values = self.chunk
        self.chunk, self.scaling = None, scaling
        self.seen += keys.shape[2] - self.step.probe_tokens - self.step.again_columns
        by_part = {id(part): look for part, look in zip(self.parts, looks, strict=True)}
        for row in self._by_row():
            row.finish(keys, values, [by_part[id(part)] for part in row.parts])

    @property
    def score_names(self) -> tuple[str, ...]:
        persisted = (SCORE,) if self.method.persists else ()
        attended = () if self.patch is None else self.patch.score_names
        return (*self.method.score_names, *persisted, *((ANGLE,) if self.ledger.packed else ()), *attended)

    @property
    def offloads(self) -> bool:
        """What leaves goes to a slow tier."""
        return self.patch is not None and self.patch.stores == "offloaded"

    @property
    def rows_apart(self) -> bool:
        """Every row is a part of its own, whether padded or not."""
        return self.patch is not None and self.patch.stores in ("offloaded", "released")

    @property
    def trims_together(self) -> bool:
        """The layer waits until all layers are trimmed: see `longfit.cache.together` and `.release`."""
        return self.method.replays or (self.patch is not None and self.patch.stores == "released")

    def keep(self, part: Part, candidate: Store, indices: Tensor, capacity: int) -> None:
        """Leave the part the candidates at `indices` [B, G, N]; the others go to the slow tier, if there is one."""
        if self.offloads and indices.shape[-1] < candidate.n:
            hand_over(part, candidate.without(indices), self.patch, self.ledger, self.rotary)
        part.store = candidate.selected(indices, capacity)

    def unreachable(self, positions: Tensor, seen: int, state: dict[str, Tensor]) -> Tensor | None:
        """Which of the candidates at `positions` [B, G, S] no later query may attend to, if any.

        `state` is that of their part.
        """
        if self.patch is None:
            return None
        reachable = self.patch.still_reachable(positions, seen, *self.depth, state)
        return None if reachable is None else ~reachable

    def _by_row(self) -> list[Row]:
        rows: dict[int, list[Part]] = {}
        for part in self.parts:
            rows.setdefault(part.rows.start, []).append(part)
        return [Row(self, parts) for parts in rows.values()]
