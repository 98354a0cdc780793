"""What a memory holds as named tensors and plain facts for JSON, and a cache made of them again.

Each part of a cache has its two ways next to each other: `_layer` and `_fill_layer`, `_part` and `_part_of`, and so on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.cache import BoundedLayer, FitCache, Part, SavedPages, Shortened, SlowTier, Store, new_tier
from longfit.compressors import Encoded, KeepAll
from longfit.fitted import stream_of

WritePage = Callable[[Tensor], int]
ACCOUNTS = ("kept_tokens", "keep_ratio", "packed", "padding", "blank", "apart", "base", "frozen")


def taken_apart(cache: FitCache, write: WritePage) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts of a cache, and its tensors by name.

    Of soft slots these are the slots, and of a prompt compressor alone the token ids that it kept: the model makes the
    keys and values again.

    Args:
        write: takes a page of a slow tier, and returns its place in the file of pages.
    """
    tensors = dict[str, Tensor]()
    shortened = None if cache.shortened is None else _shortened(cache.shortened, tensors)
    if cache.encoded is not None and cache.encoded.soft is not None:
        facts = {"slots": _encoded(cache.encoded, tensors), "rows": cache.rows, "shortened": shortened}
        assert cache.raw_ids is not None
        tensors["raw_ids"] = cache.raw_ids
        return facts, tensors
    if cache.slot_spans is not None and cache.encoded is None:
        tensors["sources"] = cache.slot_spans
    if shortened is not None and isinstance(cache.method, KeepAll) and cache.encoded is None and cache.patch is None:
        return {"shortened": shortened, "ids": True, "rows": cache.rows}, tensors
    facts = {
        "shortened": shortened,
        "rows": cache.rows,
        "chunk_tokens": cache.chunk_tokens,
        "ledger": {name: getattr(cache.ledger, name) for name in ACCOUNTS},
        "layers": [_layer(layer, f"{index}.", tensors, write) for index, layer in enumerate(cache.own_layers)],
        "encoded": None if cache.encoded is None else _encoded(cache.encoded, tensors),
    }
    return facts, tensors


def put_together(
    given: dict[str, Any], tokens_in: int, tensors: dict[str, Tensor], model: Any, pages: SavedPages | None = None
) -> FitCache:
    """The cache that `taken_apart` gave as the facts `given` and `tensors`, of a context of `tokens_in` tokens.

    Args:
        pages: those of slow tiers, where there are any.
        model: wrapped as it was when the memory was made.

    Raises:
        KeyError, TypeError, ValueError, IndexError, RuntimeError: the two do not fit each other, or not this model.
    """
    device, rows = model.get_input_embeddings().weight.device, int(given["rows"])
    cache = model.longfit.new_cache(model.get_decoder(), rows, tokens_in)
    shortened = given.get("shortened")
    if shortened is not None:
        cache.shortened = _shortened_of(shortened, tensors, model)
    if given.get("ids"):
        with torch.no_grad():
            stream_of(model, cache).fill_padded(cache.shortened.ids, cache.shortened.own_padding)
        return cache
    if "slots" in given:
        encoded = _encoded_of(given["slots"], tensors, device)
        with torch.no_grad():
            stream_of(model, cache).read_again(encoded, tensors["raw_ids"].to(device))
        return cache
    cache.rows, cache.chunk_tokens = rows, int(given["chunk_tokens"])
    for name, value in given["ledger"].items():
        if name not in ACCOUNTS:
            raise ValueError(f"no such account: {name}")
        setattr(cache.ledger, name, value)
    if given["encoded"] is not None:
        cache.encoded = _encoded_of(given["encoded"], tensors, device)
    cache.slot_spans = tensors.get("sources", tensors.get("encoded.sources"))
    if len(given["layers"]) != len(cache.own_layers):
        raise ValueError(f"{len(given['layers'])} layers for a model of {len(cache.own_layers)}")
    moved = {name: t.to(device) for name, t in tensors.items()}
    _check_entries(given["layers"], moved, model)
    for index, (layer, known) in enumerate(zip(cache.own_layers, given["layers"], strict=True)):
        _fill_layer(layer, known, f"{index}.", moved, cache, pages)
    return cache


def _encoded(encoded: Encoded, tensors: dict[str, Tensor]) -> dict[str, Any]:
    given = {"soft": encoded.soft, "states": encoded.states, "sources": encoded.sources}
    tensors.update({f"encoded.{name}": t for name, t in given.items() if t is not None})
    return {"tokens_in": encoded.tokens_in, "next_position": encoded.next_position}


def _encoded_of(facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Encoded:
    def there(name: str) -> Tensor | None:
        found = tensors.get(f"encoded.{name}")
        return None if found is None else found.to(device)

    return Encoded(
        tokens_in=int(facts["tokens_in"]),
        sources=tensors["encoded.sources"],
        next_position=int(facts["next_position"]),
        soft=there("soft"),
        states=there("states"),
    )


def _shortened(given: Shortened, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["shortened.ids"] = given.ids.clone()  # what was read raw after slots is a view of it
    tensors.update({f"shortened.places.{row}": places for row, places in enumerate(given.places)})
    names = ("own_padding", "tokens", "padding", "columns")
    return {name: getattr(given, name) for name in names}


def _shortened_of(facts: dict[str, Any], tensors: dict[str, Tensor], model: Any) -> Shortened:
    """
    Raises:
        ValueError: rows that do not fit each other, or ids that are none of the model's.
    """
    ids = tensors["shortened.ids"].to(model.get_input_embeddings().weight.device)
    lists = {name: [int(value) for value in facts[name]] for name in ("own_padding", "tokens", "padding")}
    places = [tensors[f"shortened.places.{row}"].long() for row in range(ids.shape[0])]
    if ids.ndim != 2 or ids.is_floating_point() or any(len(given) != ids.shape[0] for given in lists.values()):
        raise ValueError(f"ids of shape {tuple(ids.shape)} in {ids.dtype}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.get_input_embeddings().weight.shape[0]:
        raise ValueError("token ids outside the model's vocabulary")
    for own, kept in zip(lists["own_padding"], places, strict=True):
        if kept.shape != (ids.shape[1] - own,):
            raise ValueError(f"{tuple(kept.shape)} places for {ids.shape[1] - own} tokens")
    return Shortened(ids=ids, places=places, columns=int(facts["columns"]), **lists)


def _layer(layer: Any, at: str, tensors: dict[str, Tensor], write: WritePage) -> dict[str, Any]:
    if not isinstance(layer, BoundedLayer):
        if layer.keys is not None:
            tensors[f"{at}keys"], tensors[f"{at}values"] = layer.keys, layer.values
        return {"sliding": True, "seen": layer.get_seq_length()}
    return {
        "seen": layer.seen,
        "dropped": layer.dropped,
        "scaling": layer.scaling,
        "parts": [_part(part, f"{at}{number}.", tensors, write) for number, part in enumerate(layer.parts)],
    }


def _part(part: Part, at: str, tensors: dict[str, Tensor], write: WritePage) -> dict[str, Any]:
    if part.queries is not None and part.query_positions is not None:
        tensors |= {f"{at}queries": part.queries, f"{at}query_positions": part.query_positions}
    tensors |= {f"{at}state.{name}": t for name, t in part.state.items()}
    return {
        "rows": [part.rows.start, part.rows.stop],
        "heads": [part.heads.start, part.heads.stop],
        "padding": part.padding,
        **_store(part.store, at, tensors),
        "state": list(part.state),
        "tier": None if part.tier is None else _tier(part.tier, f"{at}tier.", tensors, write),
    }


def _store(store: Store | None, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if store is None:
        return {"capacity": None, "scores": []}
    tensors |= {f"{at}keys": store.keys, f"{at}values": store.values, f"{at}positions": store.positions}
    tensors |= {f"{at}scores.{name}": t for name, t in store.scores.items()}
    return {"capacity": store.capacity, "scores": list(store.scores)}


def _tier(tier: SlowTier, at: str, tensors: dict[str, Tensor], write: WritePage) -> dict[str, Any]:
    if tier.index is not None:
        tensors[f"{at}index"] = tier.index.used
    return {
        "places": tier.copied(write),
        "lengths": tier.lengths,
        "recent": tier.recent,
        **_store(tier.tail, at, tensors),
    }


def _check_entries(layers: list[dict[str, Any]], tensors: dict[str, Tensor], model: Any) -> None:
    """
    Raises:
        ValueError: keys or values that are not shaped like this model's.
    """
    shape = model.longfit.shape
    for index, known in enumerate(layers):
        for number, part in enumerate(known.get("parts", [])):
            if part["capacity"] is None:
                continue
            rows, heads = (slice(*part[name]) for name in ("rows", "heads"))
            sizes = {"keys": shape.key_dim, "values": shape.value_dim}
            for name, size in sizes.items():
                t = tensors[f"{index}.{number}.{name}"]
                fits = t.shape[:2] == (rows.stop - rows.start, heads.stop - heads.start) and t.shape[3] == size
                if t.ndim != 4 or not fits or heads.stop > shape.kv_heads or t.dtype != model.dtype:
                    raise ValueError(f"{name} of layer {index} are {tuple(t.shape)} in {t.dtype}")


def _fill_layer(
    layer: Any,
    known: dict[str, Any],
    at: str,
    tensors: dict[str, Tensor],
    cache: FitCache,
    pages: SavedPages | None,
) -> None:
    if not isinstance(layer, BoundedLayer):
        if f"{at}keys" in tensors:
            layer.lazy_initialization(tensors[f"{at}keys"], tensors[f"{at}values"])
            layer.keys, layer.values = tensors[f"{at}keys"], tensors[f"{at}values"]
            layer.cumulative_length = int(known["seen"])
        return
    layer.seen, layer.dropped, layer.scaling = int(known["seen"]), int(known["dropped"]), float(known["scaling"])
    layer.parts = [
        _part_of(part, f"{at}{number}.", tensors, cache, pages) for number, part in enumerate(known["parts"])
    ]
    layer.is_initialized = bool(layer.parts)
    first = next((part.store for part in layer.parts if part.store is not None), None)
    if first is not None:
        layer.dtype, layer.device = first.keys.dtype, first.keys.device


def _part_of(
    known: dict[str, Any], at: str, tensors: dict[str, Tensor], cache: FitCache, pages: SavedPages | None
) -> Part:
    part = Part(slice(*known["rows"]), slice(*known["heads"]), int(known["padding"]))
    part.store = _store_of(known, at, tensors)
    part.queries, part.query_positions = tensors.get(f"{at}queries"), tensors.get(f"{at}query_positions")
    part.state = {name: tensors[f"{at}state.{name}"] for name in known["state"]}
    if known.get("tier") is not None:
        part.tier = _tier_of(known["tier"], f"{at}tier.", tensors, cache, pages)
    return part


def _store_of(known: dict[str, Any], at: str, tensors: dict[str, Tensor]) -> Store | None:
    if known["capacity"] is None:
        return None
    keys, values, positions = (tensors[f"{at}{name}"] for name in ("keys", "values", "positions"))
    if not (keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] == positions.shape):
        raise ValueError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, positions {positions.shape}")
    capacity = min(max(keys.shape[2], int(known["capacity"])), 2 * keys.shape[2] + 1024)
    store = Store(keys, values, capacity, tuple(known["scores"]))
    scores: dict[str, Tensor | float] = {name: tensors[f"{at}scores.{name}"] for name in known["scores"]}
    store.append(keys, values, positions, scores, capacity)
    return store


def _tier_of(
    known: dict[str, Any], at: str, tensors: dict[str, Tensor], cache: FitCache, pages: SavedPages | None
) -> SlowTier:
    places, lengths, recent = ([int(value) for value in known[name]] for name in ("places", "lengths", "recent"))
    tail, index, count = _store_of(known, at, tensors), tensors.get(f"{at}index"), len(places)
    if tail is None or cache.patch is None or (pages is None and count):
        raise ValueError("a slow tier without its tail, its attention or its pages")
    tier = new_tier(cache.patch, cache.ledger, tail.keys.device)
    per_entry = tail.keys.shape[1] * (tail.keys.shape[-1] + tail.values.shape[-1]) * tail.keys.element_size()
    whole = all(
        0 < length <= tier.page_tokens and place >= 0 and place + length * per_entry <= (pages.nbytes if pages else 0)
        for place, length in zip(places, lengths, strict=True)
    )
    indexed = index is None if not count else index is not None and index.ndim == 4 and index.shape[2] == count
    if not (whole and indexed and all(0 <= page < count for page in recent)):
        raise ValueError("pages of a slow tier outside their file, or not as many as were found")
    if pages is not None:
        tier.restore(pages, places, lengths, index, recent, tail)
    return tier
