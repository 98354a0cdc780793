"""Memories on disk: a folder with `context.json`, which names one safetensors file and its hash. Never pickle.

Where the memory knows the text that it was made from, a JSON file beside it holds that. These files are written first,
under names of their own, and `context.json` then takes the place of an older one at once, so that a reader finds the
old memory or the new one, whole.
"""

import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longfit.cache import BoundedLayer, FitCache, Part, Shortened, Store
from longfit.compressors import Encoded, KeepAll
from longfit.errors import MemoryFileError, UnsupportedFeatureError
from longfit.memory import Memory, check_same

FORMAT = 1
CONTEXT = "context.json"
TENSORS = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
SOURCE = re.compile(r"source-[0-9a-f]{32}\.json")


def write(memory: Memory, folder: Path, about: dict[str, Any]) -> Path:
    """See `Memory.save`."""
    check_place(folder)
    facts, tensors = _taken_apart(memory)
    facts["about"] = about
    folder.mkdir(parents=True, exist_ok=True)
    stamp = uuid.uuid4().hex
    name, source, part = f"tensors-{stamp}.safetensors", f"source-{stamp}.json", f"{CONTEXT}.{stamp}.part"
    try:
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, str(folder / name))
        facts |= {"tensors": name, "sha256": _sha256(folder / name)}
        if memory.source is not None:
            (folder / source).write_text(json.dumps(memory.source), encoding="utf-8")
            facts |= {"source": source, "source_sha256": _sha256(folder / source)}
        (folder / part).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.replace(folder / part, folder / CONTEXT)
    except BaseException:
        for left in (name, source, part):
            (folder / left).unlink(missing_ok=True)
        raise
    for old in folder.iterdir():
        if old.name not in (name, source) and (TENSORS.fullmatch(old.name) or SOURCE.fullmatch(old.name)):
            old.unlink(missing_ok=True)
    return folder


def check_place(folder: Path) -> None:
    """
    Raises:
        MemoryFileError: no memory can be written there: it is a file, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise MemoryFileError(f"{folder} is a file; give a folder for the memory")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONTEXT).is_file():
        raise MemoryFileError(f"{folder} holds other files; give a new folder for the memory")


def read(folder: Path, model: Any) -> Memory:
    """See `Memory.load`."""
    facts = information(folder)
    here = model._fingerprint()
    check_same(facts["fingerprint"], here)
    file = folder / facts["tensors"]
    try:
        _check_hash(file, facts["sha256"])
        tensors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise MemoryFileError(f"{file} cannot be read: {error}") from error
    try:
        cache = _put_together(facts, tensors, model)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise MemoryFileError(f"{folder} does not hold what its {CONTEXT} says: {error}") from error
    question = tensors.get("question")
    device = model.get_input_embeddings().weight.device
    question = None if question is None else question.to(device)
    return Memory(cache, facts["tokens_in"], here, question, source_of(folder, facts))


def source_of(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """What a memory was made from, by its facts (see `information`); None where it does not say. Needs no model.

    Raises:
        MemoryFileError: the file of it is missing, was changed or cannot be read.
    """
    if "source" not in facts:
        return None
    name = facts["source"]
    if not isinstance(name, str) or not SOURCE.fullmatch(name):
        raise MemoryFileError(f"{folder / CONTEXT} names {name!r}, which is not a file that longfit writes")
    file = folder / name
    try:
        _check_hash(file, facts.get("source_sha256"))
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MemoryFileError(f"{file} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise MemoryFileError(f"{file} does not hold what a memory was made from")
    return given


def information(folder: Path) -> dict[str, Any]:
    """What `context.json` says of a memory, without a model.

    Raises:
        MemoryFileError: no memory there, one of another version, or one that cannot be read.
    """
    path = folder / CONTEXT
    if not path.is_file():
        raise MemoryFileError(f"{folder} holds no memory: there is no {CONTEXT} in it")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemoryFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        version = facts.get("format") if isinstance(facts, dict) else None
        raise MemoryFileError(f"{path} has format {version}; this version reads format {FORMAT}")
    known = {"tensors": str, "sha256": str, "fingerprint": dict, "tokens_in": int, "cache": dict, "about": dict}
    for key, kind in known.items():
        if not isinstance(facts.get(key), kind):
            raise MemoryFileError(f"{path} lacks {key}")
    if not TENSORS.fullmatch(facts["tensors"]):
        raise MemoryFileError(f"{path} names {facts['tensors']!r}, which is not a file that longfit writes")
    return facts


def is_memory(place: str) -> bool:
    """Whether a path is a folder that holds a memory."""
    return (Path(place) / CONTEXT).is_file()


def described(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The facts of a memory that a reader wants to see."""
    shown: dict[str, Any] = {"document": facts["about"].get("document")}
    shown |= {name: facts[name] for name in ("tokens_in", "kept_tokens", "kv_bytes") if name in facts}
    shown["file_bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    shown |= {**facts["fingerprint"], "longfit": facts.get("longfit")}
    return {key: value for key, value in shown.items() if value is not None}


def _check_hash(file: Path, known: Any) -> None:
    """
    Raises:
        MemoryFileError: the file is not what was written.
    """
    if _sha256(file) != known:
        raise MemoryFileError(f"{file} was changed or cut off; compress the document again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _taken_apart(memory: Memory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from longfit import __version__

    cache, tensors = memory.cache, dict[str, Tensor]()
    facts: dict[str, Any] = {
        "format": FORMAT,
        "longfit": __version__,
        "fingerprint": memory.fingerprint,
        "tokens_in": memory.tokens_in,
        "kept_tokens": memory.kept_tokens,
        "kv_bytes": memory.kv_bytes,
    }
    if memory.question is not None:
        tensors["question"] = memory.question
    shortened = None if cache.shortened is None else _shortened(cache.shortened, tensors)
    if cache.encoded is not None and cache.encoded.soft is not None:
        facts["cache"] = {"slots": _encoded(cache.encoded, tensors), "rows": cache.rows, "shortened": shortened}
        assert cache.raw_ids is not None
        tensors["raw_ids"] = cache.raw_ids
        return facts, tensors
    if cache.slot_spans is not None and cache.encoded is None:
        tensors["sources"] = cache.slot_spans
    if shortened is not None and isinstance(cache.method, KeepAll) and cache.encoded is None and cache.patch is None:
        facts["cache"] = {"shortened": shortened, "ids": True, "rows": cache.rows}
        return facts, tensors
    facts["cache"] = {
        "shortened": shortened,
        "rows": cache.rows,
        "chunk_tokens": cache.chunk_tokens,
        "ledger": {
            name: getattr(cache.ledger, name)
            for name in ("kept_tokens", "keep_ratio", "packed", "padding", "blank", "apart", "base", "frozen")
        },
        "layers": [_layer(layer, f"{index}.", tensors) for index, layer in enumerate(cache.own_layers)],
        "encoded": None if cache.encoded is None else _encoded(cache.encoded, tensors),
    }
    return facts, tensors


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


def _layer(layer: Any, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(layer, BoundedLayer):
        if layer.keys is not None:
            tensors[f"{at}keys"], tensors[f"{at}values"] = layer.keys, layer.values
        return {"sliding": True, "seen": layer.get_seq_length()}
    return {
        "seen": layer.seen,
        "dropped": layer.dropped,
        "scaling": layer.scaling,
        "parts": [_part(part, f"{at}{number}.", tensors) for number, part in enumerate(layer.parts)],
    }


def _part(part: Part, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if part.tier is not None:
        raise UnsupportedFeatureError(
            "this memory is partly on a slow tier, which cannot be saved yet; compress without an offloading attention"
        )
    store = part.store
    if store is not None:
        tensors |= {f"{at}keys": store.keys, f"{at}values": store.values, f"{at}positions": store.positions}
        tensors |= {f"{at}scores.{name}": t for name, t in store.scores.items()}
    if part.queries is not None and part.query_positions is not None:
        tensors |= {f"{at}queries": part.queries, f"{at}query_positions": part.query_positions}
    tensors |= {f"{at}state.{name}": t for name, t in part.state.items()}
    return {
        "rows": [part.rows.start, part.rows.stop],
        "heads": [part.heads.start, part.heads.stop],
        "padding": part.padding,
        "capacity": None if store is None else store.capacity,
        "scores": [] if store is None else list(store.scores),
        "state": list(part.state),
    }


def _put_together(facts: dict[str, Any], tensors: dict[str, Tensor], model: Any) -> FitCache:
    given, context = facts["cache"], model.longfit
    device = model.get_input_embeddings().weight.device
    rows, tokens = int(given["rows"]), facts["tokens_in"]
    cache = context.new_cache(model.get_decoder(), rows, tokens)
    shortened = given.get("shortened")
    if shortened is not None:
        cache.shortened = _shortened_of(shortened, tensors, model)
    if given.get("ids"):
        model._reread_ids(cache)
        return cache
    if "slots" in given:
        model._reread(cache, _encoded_of(given["slots"], tensors, device), tensors["raw_ids"].to(device))
        return cache
    cache.rows, cache.chunk_tokens = rows, int(given["chunk_tokens"])
    for name, value in given["ledger"].items():
        if name not in ("kept_tokens", "keep_ratio", "packed", "padding", "blank", "apart", "base", "frozen"):
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
        _fill_layer(layer, known, f"{index}.", moved)
    return cache


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


def _fill_layer(layer: Any, known: dict[str, Any], at: str, tensors: dict[str, Tensor]) -> None:
    if not isinstance(layer, BoundedLayer):
        if f"{at}keys" in tensors:
            layer.lazy_initialization(tensors[f"{at}keys"], tensors[f"{at}values"])
            layer.keys, layer.values = tensors[f"{at}keys"], tensors[f"{at}values"]
            layer.cumulative_length = int(known["seen"])
        return
    layer.seen, layer.dropped, layer.scaling = int(known["seen"]), int(known["dropped"]), float(known["scaling"])
    layer.parts = [_part_of(part, f"{at}{number}.", tensors) for number, part in enumerate(known["parts"])]
    layer.is_initialized = bool(layer.parts)
    first = next((part.store for part in layer.parts if part.store is not None), None)
    if first is not None:
        layer.dtype, layer.device = first.keys.dtype, first.keys.device


def _part_of(known: dict[str, Any], at: str, tensors: dict[str, Tensor]) -> Part:
    part = Part(slice(*known["rows"]), slice(*known["heads"]), int(known["padding"]))
    if known["capacity"] is not None:
        keys, values = tensors[f"{at}keys"], tensors[f"{at}values"]
        positions = tensors[f"{at}positions"]
        if not (keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] == positions.shape):
            raise ValueError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, positions {positions.shape}")
        capacity = min(max(keys.shape[2], int(known["capacity"])), 2 * keys.shape[2] + 1024)
        part.store = Store(keys, values, capacity, tuple(known["scores"]))
        scores: dict[str, Tensor | float] = {name: tensors[f"{at}scores.{name}"] for name in known["scores"]}
        part.store.append(keys, values, positions, scores, capacity)
    part.queries, part.query_positions = tensors.get(f"{at}queries"), tensors.get(f"{at}query_positions")
    part.state = {name: tensors[f"{at}state.{name}"] for name in known["state"]}
    return part
