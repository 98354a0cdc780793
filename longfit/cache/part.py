"""A part of a layer: rows and key/value heads whose entries are counted alike."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longfit.cache.rotary import Rotary
from longfit.cache.side_index import SideIndex
from longfit.cache.slow_tier import SlowTier
from longfit.cache.store import Store


@dataclass
class Part:
    """One store and what goes with it.

    A batch without padding and without head budgets is a single part; left-padded rows are a part each, so that no
    attention here ever needs a padding mask; methods with head budgets have a part for each row and head, so that
    what a head does not keep is not allocated.

    Attributes:
        rows, heads: the part's place in [B, G].
        padding: columns of left padding of its rows.
        store: the kept entries; None before the first real token.
        queries: [B, H, W, D] the last queries, rotated as the attention used them, or None.
        query_positions: [W] their places.
        state: running state of the method, by name, batch first.
        index: what a sparse attention keeps beside the keys; made when it first looks.
        tier: what an offloading attention moved to the slow side; made when something first leaves.
    """

    rows: slice
    heads: slice
    padding: int
    store: Store | None = None
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    index: SideIndex | None = None
    tier: SlowTier | None = None

    @property
    def kept(self) -> int:
        """Entries that each head of the part holds."""
        return 0 if self.store is None else self.store.n

    @property
    def held(self) -> int:
        """Entries that each head of the part has on the fast side, pages brought in included."""
        return self.kept + (0 if self.tier is None else self.tier.held)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the part on the fast side: entries, queries, state, index and pages brought in."""
        tensors = [t for t in (self.queries, *self.state.values()) if t is not None]
        parts = [part for part in (self.store, self.index, self.tier) if part is not None]
        return sum(part.nbytes for part in [*parts, *tensors])

    def query_heads(self, group: int) -> slice:
        """The query heads that read the part's key/value heads, `group` for each."""
        return slice(self.heads.start * group, self.heads.stop * group)

    def remember(self, queries: Tensor, positions: Tensor, window_tokens: int) -> None:
        """Keep the last `window_tokens` queries, in memory of their own."""
        if self.queries is not None and queries.shape[2] < window_tokens:
            assert self.query_positions is not None
            queries = torch.cat([self.queries, queries], 2)
            positions = torch.cat([self.query_positions, positions])
        self.queries = queries[:, :, -window_tokens:].clone()
        self.query_positions = positions[-window_tokens:].clone()

    def move_queries(self, by: int, rotary: Rotary | None) -> None:
        """Let the remembered queries follow when the packed geometry numbers the tokens anew."""
        if by and self.queries is not None and rotary is not None:
            shift = torch.full(self.queries.shape[:3], by, device=self.queries.device)
            self.queries = rotary.rotate(self.queries, shift)

    def forget_queries(self) -> None:
        self.queries = self.query_positions = None

    def select_rows(self, index: Tensor, rows: slice) -> "Part":
        """A copy that holds the rows `index` (counted within the part), placed at `rows` of a new batch."""

        def pick(t: Tensor) -> Tensor:
            return t.index_select(0, index.to(t.device))

        return Part(
            rows=rows,
            heads=self.heads,
            padding=self.padding,
            store=None if self.store is None else self.store.rows(index),
            queries=None if self.queries is None else pick(self.queries),
            query_positions=self.query_positions,
            state={name: pick(t) for name, t in self.state.items()},
            tier=None if self.tier is None else self.tier.twin(),
        )
