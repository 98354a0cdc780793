"""What left the fast side of one row of a layer, in pages that are brought back a few at a time."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.cache.side_index import Rows
from longfit.cache.slow_file import Pages, Shelf
from longfit.cache.store import Store


class SlowTier:
    """Pages of keys and values on a shelf, those brought in last on the fast side, and an index vector a page.

    Entries arrive in order at the `tail`, which is on the fast side; a method cuts pages off it. The pages brought in
    lie in `slots` slots for each head, and the one not asked for longest makes room (LRU).

    Attributes:
        tail: entries that are in no page yet; None before the first.
        lengths: entries of each page, `page_tokens` at most.
        index: [1, N, pages, W], whatever the method finds pages by; None before the first page.
        recent: pages of earlier steps, latest first, for methods that keep them.
        hits, reads: pages asked for that were on the fast side, and that had to be read.
    """

    def __init__(self, shelf: Shelf, page_tokens: int, slots: int) -> None:
        self.shelf, self.page_tokens, self.slots = shelf, page_tokens, slots
        self.tail: Store | None = None
        self.places: list[tuple[Pages, int]] = []
        self.lengths: list[int] = []
        self.index: Rows | None = None
        self.recent: list[int] = []
        self.hits = self.reads = 0
        self.slow_bytes = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._slot_of: list[OrderedDict[int, int]] = []

    @property
    def pages(self) -> int:
        return len(self.places)

    @property
    def held(self) -> int:
        """Entries of each head for which there is room on the fast side."""
        tail = 0 if self.tail is None else self.tail.capacity
        return tail + self._room * self.page_tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the fast side."""
        parts = (self.tail, self.index, self._keys, self._values)
        return sum(part.nbytes for part in parts if part is not None)

    def receive(self, entries: Store) -> None:
        """Take entries of one row behind the tail."""
        if self.tail is None:
            self.tail = entries
            return
        given: dict[str, Tensor | float] = dict(entries.scores)
        self.tail = self.tail.extended(entries.keys, entries.values, entries.positions, given)

    def put_away(self, span: slice, vector: Tensor) -> None:
        """Write a stretch of the tail to the shelf as a page, found by `vector` [1, N, W].

        Raises:
            OffloadError: there is no room on the shelf.
        """
        assert self.tail is not None
        keys, values = self.tail.keys[0, :, span], self.tail.values[0, :, span]
        G = keys.shape[0]
        page = torch.cat([keys.reshape(G, -1), values.reshape(G, -1)], 1)  # a head's keys, then its values
        self.places.append((self.shelf, self.shelf.write(page)))
        self.lengths.append(keys.shape[1])
        self.slow_bytes += page.nbytes
        if self.index is None:
            self.index = Rows(vector.unsqueeze(2).clone())
        else:
            self.index.append(vector.unsqueeze(2))

    def forget(self, tokens: int) -> None:
        """Drop the first entries of the tail: they are in pages now."""
        assert self.tail is not None
        n, G = self.tail.n, self.tail.keys.shape[1]
        rest = torch.arange(tokens, n, device=self.tail.keys.device).expand(1, G, -1)
        self.tail = self.tail.selected(rest, n - tokens)

    def ask(self, pages: list[list[int]]) -> None:
        """Start reading the pages, as many for each of the G heads, that are not on the fast side; `slots` at most."""
        assert self.tail is not None
        G = len(pages)
        if not self._slot_of:
            self._slot_of = [OrderedDict() for _ in range(G)]
        if self._keys is None or self._values is None or self._room < min(self.slots, self.pages):
            room = min(self.slots, max(self.pages, 2 * self._room))
            self._keys = self._grown(self._keys, self.tail.keys, room)
            self._values = self._grown(self._values, self.tail.values, room)
        for head, asked in enumerate(pages):
            self._read_missing(head, asked)

    def brought(self, pages: list[list[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys [1, G, k * page_tokens, D] and values of the k pages a head that were asked for last.

        Also which of them are entries, bool [1, G, k * page_tokens]; None where all are.
        """
        assert self._keys is not None and self._values is not None
        G, k = len(pages), len(pages[0])
        for shelf in {id(shelf): shelf for shelf, _ in self.places}.values():
            shelf.wait()
        slots = torch.tensor([[self._slot_of[head][page] for page in asked] for head, asked in enumerate(pages)])
        flat = (slots + torch.arange(G)[:, None] * self._room).reshape(-1).to(self._keys.device)
        keys = self._keys.flatten(0, 1).index_select(0, flat).view(1, G, k * self.page_tokens, -1)
        values = self._values.flatten(0, 1).index_select(0, flat).view(1, G, k * self.page_tokens, -1)
        lengths = torch.tensor([[self.lengths[page] for page in asked] for asked in pages], device=keys.device)
        if bool((lengths == self.page_tokens).all()):
            return keys, values, None
        within = torch.arange(self.page_tokens, device=keys.device) < lengths[..., None]
        return keys, values, within.reshape(1, G, -1)

    def _read_missing(self, head: int, asked: list[int]) -> None:
        """Read what one head is missing into the slots that it used longest ago."""
        known = self._slot_of[head]
        missing = [page for page in asked if page not in known]
        self.hits += len(asked) - len(missing)
        self.reads += len(missing)
        for page in asked:
            if page in known:
                known.move_to_end(page)
        for page in missing:
            slot = len(known) if len(known) < self._room else known.popitem(last=False)[1]
            known[page] = slot
            self._read(page, head, slot)

    @property
    def _room(self) -> int:
        """Slots that there are so far."""
        return 0 if self._keys is None else self._keys.shape[1]

    def _grown(self, buffer: Tensor | None, like: Tensor, room: int) -> Tensor:
        """The buffer with room for more pages, [G, room, page_tokens, D]; zeros where nothing is filled in yet."""
        new = like.new_zeros(like.shape[1], room, self.page_tokens, like.shape[-1])
        if buffer is not None:
            new[:, : buffer.shape[1]] = buffer
        return new

    def _read(self, page: int, head: int, slot: int) -> None:
        assert self._keys is not None and self._values is not None
        shelf, place = self.places[page]
        n = self.lengths[page]
        keys, values = self._keys[head, slot, :n], self._values[head, slot, :n]
        start = head * (keys.numel() + values.numel())
        shelf.read(place, start, keys)
        shelf.read(place, start + keys.numel(), values)

    # -- saving ---------------------------------------------------------------------------------------------------

    def copied(self, write: Callable[[Tensor], int]) -> list[int]:
        """Give every page to `write`, one at a time; returns what it says, the places of the copies."""
        assert self.tail is not None
        keys, values = self.tail.keys, self.tail.values
        wide = keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        places = []
        for (shelf, place), length in zip(self.places, self.lengths, strict=True):
            page = keys.new_empty(length * wide)
            shelf.read(place, 0, page)
            shelf.wait()
            places.append(write(page))
        return places

    def restore(
        self, pages: Pages, places: list[int], lengths: list[int], index: Tensor | None, recent: list[int], tail: Store
    ) -> None:
        """Be what a tier was whose pages were `copied` to these places; `index` is [1, N, pages, W]."""
        self.tail, self.lengths, self.recent = tail, lengths, recent
        self.places = [(pages, place) for place in places]
        wide = tail.keys.shape[1] * (tail.keys.shape[-1] + tail.values.shape[-1])
        self.slow_bytes = sum(lengths) * wide * tail.keys.element_size()
        self.index = None if index is None else Rows(index)

    # -- copies ---------------------------------------------------------------------------------------------------

    def twin(self) -> "SlowTier":
        """A copy within the same cache: the pages are shared, new ones go to the same shelf."""
        return copy.deepcopy(self, {id(self.shelf): self.shelf})

    def __deepcopy__(self, memo: dict[int, Any]) -> "SlowTier":
        """A copy that reads the same pages and writes new ones to a shelf of its own."""
        memo[id(self)] = new = object.__new__(SlowTier)
        shared = {"places": list(self.places), "lengths": list(self.lengths)}
        rest = {name: value for name, value in self.__dict__.items() if name not in shared}
        new.__dict__.update(shared, **copy.deepcopy(rest, memo))
        return new
