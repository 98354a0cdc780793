"""The cache layer that holds the budget."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longfit.cache.hand_over import hand_over, room_beside_pages
from longfit.cache.ledger import ANGLE, Ledger
from longfit.cache.part import Part
from longfit.cache.rotary import Rotary
from longfit.cache.step import Step
from longfit.cache.store import Store
from longfit.cache.trim import SCORE, score, trim
from longfit.cache.view import View
from longfit.errors import BudgetExceededError, UnsupportedFeatureError

HANDLE = "_longfit_layer"
INFINITY = float("inf")


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

    def stored_keys(self, part: Part, query_length: int) -> Tensor | None:
        """The part's kept keys [B, G, n, D] as this forward's queries should see them; None if there are none."""
        if part.store is None or part.store.n == 0:
            return None
        if self.ledger.packed and not self.ledger.frozen:
            assert self.rotary is not None
            return self.rotary.rotate(part.store.keys, self.ledger.places(part))
        return part.store.keys

    def make_room(self) -> None:
        """Before a decoded token is stored: drop a few entries of every row that is full (1/64 of its limit)."""
        for row in self._by_row():
            if row[0].store is None:
                continue
            limit = self._row_limit(row, self.seen + 1)
            if sum(part.kept for part in row) + len(row) <= limit:
                continue
            n_keep = limit // len(row) - max(1, limit // len(row) // 64)
            views = [self._view(part, part.store, new=0, n_keep=n_keep) for part in row]
            self._trim(
                row,
                [part.store for part in row if part.store is not None],
                views,
                n_keep,
                limit // len(row) - n_keep,
            )

    def finish(self, looks: list["Look"], scaling: float) -> None:
        """Store the chunk, let the method look at it, trim. Called once by the attention function.

        Raises:
            BudgetExceededError: the layer holds more than its limit afterwards.
        """
        assert self.chunk is not None
        keys, values = self.chunk
        self.chunk, self.scaling = None, scaling
        step, Q = self.step, keys.shape[2]
        self.seen += Q - step.probe_tokens - step.again_columns
        by_part = {id(part): look for part, look in zip(self.parts, looks, strict=True)}
        for row in self._by_row():
            span = step.span(row[0].rows.start, Q)
            real = max(0, Q - step.probe_tokens - span.start)
            if real == 0 and (not step.replayed_tokens or row[0].store is None):
                continue
            limit = self._row_limit(row, self.seen)
            own = [(keys[p.rows, p.heads, span], values[p.rows, p.heads, span]) for p in row]
            again = len(step.again[row[0].rows.start]) if step.again else 0
            first = self.seen - row[0].padding - real + again
            positions = step.places(row[0].rows.start, first, own[0][0].shape[2], keys.device)
            candidates = [
                self._take_in(part, *new, positions[:real], limit // len(row), by_part[id(part)].scores)
                for part, new in zip(row, own, strict=True)
            ]
            for part in row:
                self._remember(part, by_part[id(part)].queries, positions)
            crowded = sum(store.n for store in candidates) > limit and not self.trims_together
            scored = self.method.persists and step.phase == "prefill" and not self.trims_together
            views = []
            if self.method.observes or crowded or scored:
                for part, candidate, (new_keys, _) in zip(row, candidates, own, strict=True):
                    views.append(
                        self._look(part, candidate, new_keys, by_part[id(part)], positions, real, limit // len(row))
                    )
            if self.trims_together:
                continue
            if crowded:
                self._trim(row, candidates, views, limit // len(row), 0)
            else:
                if scored:
                    score(self.method, candidates, views)
                for part, candidate in zip(row, candidates, strict=True):
                    part.store = candidate
            if sum(part.kept for part in row) > limit:
                raise BudgetExceededError(
                    f"layer {self.index} holds {sum(p.kept for p in row)} entries, its limit is {limit}"
                )

    def _take_in(
        self, part: Part, keys: Tensor, values: Tensor, positions: Tensor, limit: int, scores: dict[str, Tensor]
    ) -> Store:
        """Join the chunk to the part's store, in place while it fits, else in a candidate store of its own.

        The new tokens that have one of `positions` are stored, those after them are probes. `scores` [B, G, Q] by name
        are the attention's.
        """
        step, real = self.step, positions.shape[0]
        if part.store is None:
            expected = max(step.total_tokens, self.seen) - part.padding
            capacity = real if step.hold else min(limit, max(expected, real))
            part.store = Store(keys, values, capacity, self.score_names)
        if not real:
            return part.store
        resting, angles = self._at_rest(part, keys[:, :, :real])
        given = {name: t[:, :, :real] for name, t in scores.items()}
        new = (resting, values[:, :, :real], positions, {SCORE: INFINITY, ANGLE: angles, **given})
        if step.hold or self.trims_together or part.store.n + real <= max(limit, part.store.capacity):
            part.store.append(*new, limit)
            return part.store
        return part.store.extended(*new)

    def _look(
        self, part: Part, candidate: Store, keys: Tensor, look: "Look", positions: Tensor, real: int, limit: int
    ) -> View:
        """What the method sees of the part after this forward; it observes it here."""
        step = self.step
        view = self._view(part, candidate, new=real, n_keep=limit)
        if self.ledger.packed and not self.ledger.frozen:
            stored = [look.stored_keys] if look.stored_keys is not None else []
            view.keys = torch.cat([*stored, keys[:, :, :real]], 2)
        view.probe_keys = keys[:, :, real:] if step.probe_tokens else None
        view.all_queries, view.all_query_positions, view.log_sum_exp = (
            look.queries,
            positions,
            look.log_sum_exp,
        )
        view.replayed = max(0, step.replayed_tokens - (step.trailing[part.rows.start] if step.trailing else 0))
        if step.question_tokens:
            view.queries, view.query_positions = (
                look.queries[:, :, -step.question_tokens :],
                positions[-step.question_tokens :],
            )
            view.protected = step.question_tokens - step.probe_tokens
        if self.method.observes:
            started = time.perf_counter()
            self.method.observe(view)
            self.score_seconds += time.perf_counter() - started
        return view

    def _remember(self, part: Part, queries: Tensor, positions: Tensor) -> None:
        """Keep the last queries, which score where the question is not known."""
        if self.method.window_tokens and not self.step.probe_tokens:
            part.remember(queries, positions, self.method.window_tokens)

    def _at_rest(self, part: Part, keys: Tensor) -> tuple[Tensor, Tensor | float]:
        """Keys as they are stored, and the rotary position at which they are (packed geometry only)."""
        if not self.ledger.packed:
            return keys, 0.0
        first, n = self.ledger.base[part.rows.start], keys.shape[2]
        angles = torch.arange(first, first + n, device=keys.device).expand(keys.shape[:3])
        if self.ledger.frozen:
            return keys, angles.float()
        assert self.rotary is not None
        return self.rotary.rotate(keys, -angles), 0.0

    def _row_limit(self, row: list[Part], seen: int) -> int:
        """Entries that the heads of a row may hold together (a part of several heads counts once)."""
        return len(row) * self.limit(row[0].padding, seen)

    @property
    def score_names(self) -> tuple[str, ...]:
        persisted = (SCORE,) if self.method.persists else ()
        attended = () if self.patch is None else self.patch.score_names
        return (*self.method.score_names, *persisted, *((ANGLE,) if self.ledger.packed else ()), *attended)

    def _view(self, part: Part, store: Store | None, new: int, n_keep: int) -> View:
        assert store is not None
        return View(
            keys=store.keys,
            values=store.values,
            positions=store.positions,
            new=new,
            queries=part.queries,
            query_positions=part.query_positions,
            scaling=self.scaling,
            n_keep=n_keep,
            seen=self.seen - part.padding,
            next_position=self.ledger.base[part.rows.start] + new,
            first_head=part.heads.start,
            layer=self.index,
            layers=self.count,
            phase=self.step.phase,
            scores=store.scores,
            state=part.state,
            rotate=None if self.rotary is None else self.rotary.rotate,
        )

    def _trim(self, row: list[Part], candidates: list[Store], views: list[View], n_keep: int, reserve: int) -> None:
        started = time.perf_counter()
        chosen = trim(self.method, candidates, views, n_keep, self.unreachable)
        self.score_seconds += time.perf_counter() - started
        for part, candidate, indices in zip(row, candidates, chosen, strict=True):
            self.keep(part, candidate, indices, indices.shape[-1] + reserve)
        self.dropped += sum(c.n for c in candidates) - n_keep * len(row)

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
        """The layer waits until all layers are trimmed: see `FitCache.trim_together` and `longfit.cache.release`."""
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

    def _by_row(self) -> list[list[Part]]:
        """The parts of each row (or of all rows, where they are alike), heads in order."""
        rows: dict[int, list[Part]] = {}
        for part in self.parts:
            rows.setdefault(part.rows.start, []).append(part)
        return list(rows.values())


@dataclass
class Look:
    """What the attention function computed for one part, for the method to look at.

    queries [b, h, Q, D] without padding, log_sum_exp [b, h, Q], the kept keys as the queries saw them, and what the
    attention wants to remember of the new tokens, [b, g, Q] by name.
    """

    queries: Tensor
    log_sum_exp: Tensor
    stored_keys: Tensor | None
    scores: dict[str, Tensor] = field(default_factory=dict)
