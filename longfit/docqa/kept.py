"""What was kept: for every token of a context, the fraction of layers and heads that still hold it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from longfit.docqa.source import Source
from longfit.errors import InputError, MemoryFileError, UnsupportedFeatureError
from longfit.memory import Memory
from longfit.memory_file import information

OUTSIDE = -1  # the document of a token that is of none: the chat template's
Integers = NDArray[np.int64]
Shares = NDArray[np.float32]


class Entries(NamedTuple):
    """What heads `heads` of one layer hold: the places [heads, n] of their entries among the tokens of the context."""

    heads: slice
    places: Integers


@dataclass(frozen=True)
class Kept:
    """How much of each context token is still there. T tokens, L full-attention layers, G key/value heads.

    A head that holds a token's own key and value counts whole. Where a slot of a learned compressor stands for several
    tokens, each of them counts its part of it: one of four for a slot of four. So the sum over tokens is the number of
    entries that a head holds. What a prompt compressor left out is kept by none. Sliding layers keep what their window
    shows, whatever the method, and are left out.

    Attributes:
        shares: [L, T] fraction of the layer's heads that kept the token.
        layers: place of each of the L layers among all layers of the model.
        spans: [T, 3] document (`OUTSIDE` for none), start and end of the token's text, characters of that document.
    """

    shares: Shares
    layers: tuple[int, ...]
    spans: Integers

    def __post_init__(self) -> None:
        if self.spans.shape != (self.shares.shape[1], 3):
            raise InputError(
                f"the context has {self.shares.shape[1]} tokens and {len(self.spans)} of them have a place in the "
                "text: the document or the tokenizer is another than the memory was made with"
            )

    @property
    def share(self) -> Shares:
        """[T] the mean over layers."""
        return self.shares.mean(0)

    def of_span(self, start: int, end: int, document: int = 0) -> float | None:
        """The mean of `share` over the tokens that overlap characters `start` to `end` of a document; None if none."""
        which, first, last = self.spans.T
        inside = (which == document) & (first < end) & (last > start)
        return float(self.share[inside].mean()) if inside.any() else None


def kept(memory: Memory, spans: Integers, row: int = 0) -> Kept:
    """What one row of a memory kept.

    Args:
        spans: [T, 3] as in `Kept`; `no_text(tokens)` where the text does not matter.

    Raises:
        InputError: the context has not as many tokens as spans.
    """
    cache = memory.cache
    tokens = cache.seen - (cache.ledger.padding or [0])[row]
    layers = [list(_held(layer, row, tokens)) for layer in cache.bounded]
    sources = None if cache.slot_spans is None else _row(cache.slot_spans.cpu().numpy(), row)
    states = cache.encoded is not None and cache.encoded.states is not None
    shares = _shares(layers, tokens, sources, states)
    if cache.shortened is not None:
        shares = _as_given(shares, cache.shortened.places[row].cpu().numpy(), cache.shortened.tokens[row])
    return Kept(shares, tuple(layer.depth[0] for layer in cache.bounded), spans)


def kept_on_disk(folder: Path, spans: Integers, row: int = 0) -> Kept:
    """The same of a saved memory; no model is needed, and only positions are read.

    Raises:
        MemoryFileError: no memory, or one that cannot be read.
        UnsupportedFeatureError: soft slots that another method trims when they are read, which takes the model.
    """
    facts = information(folder)
    given, tokens = facts["cache"], facts["tokens_in"]
    try:
        with safe_open(str(folder / facts["tensors"]), framework="numpy") as file:
            names = set(file.keys())

            def read(name: str) -> Any:
                return file.get_tensor(name) if name in names else None

            places, shortened = read(f"shortened.places.{row}"), given.get("shortened")
            if "slots" in given:
                same = _of_slots(facts, read, tokens if shortened is None else len(places), row)
                same = same if shortened is None else _as_given(same, places, shortened["tokens"][row])
                return Kept(same, (0,), spans)
            if given.get("ids"):  # a shorter prompt that is read again: every layer holds the same
                slots = read("sources")
                slots = np.zeros((0, 2), np.int64) if slots is None else _row(slots, row)
                first = int(slots[:, 1].max(initial=0))
                held = np.concatenate([slots[:, 1] - 1, np.arange(first, len(places))])
                same = _shares([[Entries(slice(0, 1), held[None])]], len(places), slots, False)
                return Kept(_as_given(same, places, shortened["tokens"][row]), (0,), spans)
            full = [(place, layer) for place, layer in enumerate(given["layers"]) if "parts" in layer]
            layers = [list(_saved(layer, f"{place}.", read, row)) for place, layer in full]
            if full:
                tokens = full[0][1]["seen"] - _padding(full[0][1], row)
            crossed = "encoded.states" in names
            sources = read("encoded.sources" if crossed else "sources")
            shares = _shares(layers, tokens, None if sources is None else _row(sources, row), crossed)
            if shortened is not None:
                shares = _as_given(shares, places, shortened["tokens"][row])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise MemoryFileError(f"{folder} cannot be read: {error}") from error
    return Kept(shares, tuple(place for place, _ in full), spans)


def no_text(tokens: int) -> Integers:
    """Spans [T, 3] of tokens that are of no document."""
    return np.full((tokens, 3), OUTSIDE, dtype=np.int64)


def spans_of(source: Source) -> Integers:
    """Where the tokens of a context lie in its documents, [T, 3] as in `Kept`.

    A token reaches to where the next begins.

    Raises:
        InputError: the tokenizer could not say where tokens begin.
    """
    if not source.token_starts:
        raise InputError(
            "what was kept cannot be shown in the text: the tokenizer does not say where its tokens begin; use one of "
            "the tokenizers library (a fast one)"
        )
    starts = np.asarray(source.token_starts, dtype=np.int64)
    after = np.searchsorted(starts, starts, side="right")
    ends = np.append(starts, len(source.text))[after]
    spans = no_text(len(starts))
    for number, (document, place) in enumerate(zip(source.documents, source.places, strict=True)):
        stop = place + len(document.text)
        inside = (starts < stop) & (ends > place)
        spans[inside, 0] = number
        spans[inside, 1] = starts[inside].clip(place, stop) - place
        spans[inside, 2] = ends[inside].clip(place, stop) - place
    return spans


def _held(layer: Any, row: int, tokens: int) -> Iterable[Entries]:
    for part in layer.parts:
        if not part.rows.start <= row < part.rows.stop or part.store is None:
            continue
        if part.tier is not None:  # what left the fast side can be fetched again: nothing is dropped
            heads = part.heads.stop - part.heads.start
            yield Entries(part.heads, np.broadcast_to(np.arange(tokens), (heads, tokens)))
            continue
        yield Entries(part.heads, part.store.positions[row - part.rows.start].cpu().numpy().astype(np.int64))


def _saved(layer: dict[str, Any], at: str, read: Any, row: int) -> Iterable[Entries]:
    for number, part in enumerate(layer["parts"]):
        first, stop = part["rows"]
        positions = read(f"{at}{number}.positions")
        if first <= row < stop and positions is not None:
            yield Entries(slice(*part["heads"]), positions[row - first].astype(np.int64))


def _padding(layer: dict[str, Any], row: int) -> int:
    """Columns of padding before the row."""
    return int(next((part["padding"] for part in layer["parts"] if part["rows"][0] <= row < part["rows"][1]), 0))


def _as_given(shares: NDArray[Any], places: Integers, tokens: int) -> Shares:
    """Shares of a prompt that was shortened first, [L, n], as shares of the `tokens` tokens that were given.

    Args:
        places: of the tokens that were left of it; what the cache read after them was given as it is.
    """
    later = shares.shape[1] - len(places)
    given = np.zeros((len(shares), tokens + later), np.float32)
    given[:, np.concatenate([places, np.arange(tokens, tokens + later)]).astype(np.int64)] = shares
    return given


def _of_slots(facts: dict[str, Any], read: Any, tokens: int, row: int) -> Shares:
    """[1, T]: soft slots hold the same in every layer and head, so they are one layer here."""
    sources, raw = _row(read("encoded.sources"), row), read("raw_ids")
    first = int(facts["cache"]["slots"]["tokens_in"])
    if round(facts["kept_tokens"]) != len(sources) + raw.shape[1]:
        raise UnsupportedFeatureError(
            "the slots of this memory are trimmed when they are read, and what then stays is not on disk; load it "
            "with its model (longfit.Memory.load) and use longfit.docqa.kept"
        )
    places = np.concatenate([sources[:, 1] - 1, np.arange(first, first + raw.shape[1])])
    return _shares([[Entries(slice(0, 1), places[None])]], tokens, sources, False)


def _row(sources: Any, row: int) -> Integers:
    """[M, 2] of one row."""
    return np.asarray(sources if sources.ndim == 2 else sources[row], dtype=np.int64)


def _shares(layers: list[list[Entries]], tokens: int, sources: Integers | None, crossed: bool) -> Shares:
    """[L, T]; `crossed`: the slots are read by cross-attention, in every layer beside its own entries."""
    firsts = np.full(tokens, -1)
    if sources is not None:  # of a slot and a token that end together the token counts
        np.maximum.at(firsts, sources[:, 1] - 1, sources[:, 0])
    firsts = np.where(firsts < 0, np.arange(tokens), firsts)
    shares = np.zeros((len(layers), tokens))
    for share, entries in zip(shares, layers, strict=True):
        heads = max((held.heads.stop for held in entries), default=1)
        for held in entries:
            last = held.places.reshape(-1)
            share += _covered(firsts[last], last + 1, tokens) / heads
        if crossed and sources is not None:
            share += _covered(sources[:, 0], sources[:, 1], tokens)
    return shares.clip(0, 1).astype(np.float32)


def _covered(starts: Integers, stops: Integers, tokens: int) -> NDArray[np.float64]:
    """[T] the part of all spans that falls on each token, a whole for each span."""
    steps = np.zeros(tokens + 1)
    np.add.at(steps, starts, 1 / (stops - starts))
    np.add.at(steps, stops, -1 / (stops - starts))
    return steps.cumsum()[:-1].round(6)
