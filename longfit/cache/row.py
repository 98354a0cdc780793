"""A row of one layer: it takes the chunk in, lets the method look at it, and is trimmed."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longfit.cache.ledger import ANGLE
from longfit.cache.look import Look
from longfit.cache.part import Part
from longfit.cache.store import Store
from longfit.cache.trim import SCORE, score, trim
from longfit.cache.view import View
from longfit.errors import BudgetExceededError

if TYPE_CHECKING:
    from longfit.cache.layer import BoundedLayer

INFINITY = float("inf")


@dataclass
class Row:
    """The parts of one row of a layer (or of all rows, where they are alike), heads in order.

    They share one limit: a method with head budgets decides which head keeps how much of it.
    """

    layer: "BoundedLayer"
    parts: list[Part]

    def limit(self, seen: int) -> int:
        """Entries that the heads may hold together (a part of several heads counts once), after `seen` columns."""
        return len(self.parts) * self.layer.limit(self.parts[0].padding, seen)

    @property
    def kept(self) -> int:
        """Entries that the heads hold together."""
        return sum(part.kept for part in self.parts)

    def make_room(self) -> None:
        """Before a decoded token is stored: drop a few entries if the row is full (1/64 of its limit)."""
        if self.parts[0].store is None:
            return
        limit = self.limit(self.layer.seen + 1)
        if self.kept + len(self.parts) <= limit:
            return
        per_head = limit // len(self.parts)
        n_keep = per_head - max(1, per_head // 64)
        views = [self.view(part, part.store, new=0, n_keep=n_keep) for part in self.parts]
        stores = [part.store for part in self.parts if part.store is not None]
        self.trim(stores, views, n_keep, reserve=per_head - n_keep)

    def finish(self, keys: Tensor, values: Tensor, looks: list[Look]) -> None:
        """Store the row's tokens of a forward, let the method look at them, trim.

        Args:
            keys, values: [B, G, Q, D] and [B, G, Q, Dv] of the whole forward.
            looks: what the attention left for each part.

        Raises:
            BudgetExceededError: the row holds more than its limit afterwards.
        """
        layer, step, parts = self.layer, self.layer.step, self.parts
        row, Q = parts[0].rows.start, keys.shape[2]
        span = step.span(row, Q)
        real = max(0, Q - step.probe_tokens - span.start)
        if real == 0 and (not step.replayed_tokens or parts[0].store is None):
            return
        limit = self.limit(layer.seen)
        per_head = limit // len(parts)
        own = [(keys[p.rows, p.heads, span], values[p.rows, p.heads, span]) for p in parts]
        again = len(step.again[row]) if step.again else 0
        first = layer.seen - parts[0].padding - real + again
        positions = step.places(row, first, own[0][0].shape[2], keys.device)
        candidates = [
            self._take_in(part, *new, positions[:real], per_head, look.scores)
            for part, new, look in zip(parts, own, looks, strict=True)
        ]
        for part, look in zip(parts, looks, strict=True):
            self._remember(part, look.queries, positions)
        crowded = sum(store.n for store in candidates) > limit and not layer.trims_together
        scored = layer.method.persists and step.phase == "prefill" and not layer.trims_together
        views = []
        if layer.method.observes or crowded or scored:
            for part, candidate, (new_keys, _), look in zip(parts, candidates, own, looks, strict=True):
                views.append(self._observed(part, candidate, new_keys, look, positions, real, per_head))
        if layer.trims_together:
            return
        if crowded:
            self.trim(candidates, views, per_head)
        else:
            if scored:
                score(layer.method, candidates, views)
            for part, candidate in zip(parts, candidates, strict=True):
                part.store = candidate
        if self.kept > limit:
            raise BudgetExceededError(f"layer {layer.index} holds {self.kept} entries, its limit is {limit}")

    def _take_in(
        self, part: Part, keys: Tensor, values: Tensor, positions: Tensor, limit: int, scores: dict[str, Tensor]
    ) -> Store:
        """Join the chunk to the part's store, in place while it fits, else in a candidate store of its own.

        The new tokens that have one of `positions` are stored, those after them are probes. `scores` [B, G, Q] by name
        are the attention's.
        """
        layer, step, real = self.layer, self.layer.step, positions.shape[0]
        if part.store is None:
            expected = max(step.total_tokens, layer.seen) - part.padding
            capacity = real if step.hold else min(limit, max(expected, real))
            part.store = Store(keys, values, capacity, layer.score_names)
        if not real:
            return part.store
        resting, angles = layer.ledger.at_rest(part, keys[:, :, :real], layer.rotary)
        given = {name: t[:, :, :real] for name, t in scores.items()}
        new = (resting, values[:, :, :real], positions, {SCORE: INFINITY, ANGLE: angles, **given})
        if step.hold or layer.trims_together or part.store.n + real <= max(limit, part.store.capacity):
            part.store.append(*new, limit)
            return part.store
        return part.store.extended(*new)

    def _remember(self, part: Part, queries: Tensor, positions: Tensor) -> None:
        """Keep the last queries, which score where the question is not known."""
        if self.layer.method.window_tokens and not self.layer.step.probe_tokens:
            part.remember(queries, positions, self.layer.method.window_tokens)

    def _observed(
        self, part: Part, candidate: Store, keys: Tensor, look: Look, positions: Tensor, real: int, limit: int
    ) -> View:
        """What the method sees of the part after this forward; it observes it here."""
        layer, step = self.layer, self.layer.step
        view = self.view(part, candidate, new=real, n_keep=limit)
        if layer.ledger.packed and not layer.ledger.frozen:
            stored = [look.stored_keys] if look.stored_keys is not None else []
            view.keys = torch.cat([*stored, keys[:, :, :real]], 2)
        view.probe_keys = keys[:, :, real:] if step.probe_tokens else None
        view.all_queries, view.all_query_positions, view.log_sum_exp = look.queries, positions, look.log_sum_exp
        view.replayed = max(0, step.replayed_tokens - (step.trailing[part.rows.start] if step.trailing else 0))
        if asked := step.question_tokens:
            view.queries, view.query_positions = look.queries[:, :, -asked:], positions[-asked:]
            view.protected = asked - step.probe_tokens
        if layer.method.observes:
            started = time.perf_counter()
            layer.method.observe(view)
            layer.score_seconds += time.perf_counter() - started
        return view

    def view(self, part: Part, store: Store | None, new: int, n_keep: int) -> View:
        """What a method may see of a part's entries, of which the last `new` came with this forward."""
        assert store is not None
        layer = self.layer
        return View(
            keys=store.keys,
            values=store.values,
            positions=store.positions,
            new=new,
            queries=part.queries,
            query_positions=part.query_positions,
            scaling=layer.scaling,
            n_keep=n_keep,
            seen=layer.seen - part.padding,
            next_position=layer.ledger.base[part.rows.start] + new,
            first_head=part.heads.start,
            layer=layer.index,
            layers=layer.count,
            phase=layer.step.phase,
            scores=store.scores,
            state=part.state,
            rotate=None if layer.rotary is None else layer.rotary.rotate,
        )

    def trim(self, candidates: list[Store], views: list[View], n_keep: int, reserve: int = 0) -> None:
        """Leave each part what the method chooses of its candidates, `n_keep` a head on average, and room for more."""
        layer, started = self.layer, time.perf_counter()
        chosen = trim(layer.method, candidates, views, n_keep, layer.unreachable, layer.ledger.head_limit)
        layer.score_seconds += time.perf_counter() - started
        for part, candidate, indices in zip(self.parts, candidates, chosen, strict=True):
            layer.keep(part, candidate, indices, indices.shape[-1] + reserve)
        layer.dropped += sum(c.n for c in candidates) - n_keep * len(self.parts)
