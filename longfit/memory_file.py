"""Memories on disk: a folder with `context.json`, which names one safetensors file and its hash. Never pickle.

Pages of a slow tier lie in a file beside it, bytes and nothing else. Where the memory knows the text that it was made
from, a JSON file holds that. These files are written first,
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from longfit import __version__
from longfit.cache import SavedPages
from longfit.errors import MemoryFileError
from longfit.memory import Memory, check_same
from longfit.memory_pages import PageFile
from longfit.memory_tensors import put_together, taken_apart

FORMAT = 1
CONTEXT = "context.json"
TENSORS = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
PAGES = re.compile(r"pages-[0-9a-f]{32}\.bin")
SOURCE = re.compile(r"source-[0-9a-f]{32}\.json")


def write(memory: Memory, folder: Path, about: dict[str, Any]) -> Path:
    """See `Memory.save`."""
    check_place(folder)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "longfit": __version__,
        "fingerprint": memory.fingerprint,
        "tokens_in": memory.tokens_in,
        "kept_tokens": memory.kept_tokens,
        "kv_bytes": memory.kv_bytes,
        "about": about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stamp = uuid.uuid4().hex
    name, source, part = f"tensors-{stamp}.safetensors", f"source-{stamp}.json", f"{CONTEXT}.{stamp}.part"
    pages = PageFile(folder / f"pages-{stamp}.bin")
    try:
        facts["cache"], tensors = taken_apart(memory.cache, pages.write)
        if memory.question is not None:
            tensors["question"] = memory.question
        if (written := pages.close()) is not None:
            facts |= {"pages": pages.path.name, "pages_sha256": written}
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, str(folder / name))
        facts |= {"tensors": name, "sha256": _sha256(folder / name)}
        if memory.source is not None:
            (folder / source).write_text(json.dumps(memory.source), encoding="utf-8")
            facts |= {"source": source, "source_sha256": _sha256(folder / source)}
        (folder / part).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.replace(folder / part, folder / CONTEXT)
    except BaseException:
        pages.close()
        for left in (name, source, part, pages.path.name):
            (folder / left).unlink(missing_ok=True)
        raise
    for old in folder.iterdir():
        ours = any(kind.fullmatch(old.name) for kind in (TENSORS, SOURCE, PAGES))
        if ours and old.name not in (name, source, pages.path.name):
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
        pages = _pages_of(folder, facts)
    except (OSError, SafetensorError) as error:
        raise MemoryFileError(f"{file} cannot be read: {error}") from error
    try:
        cache = put_together(facts["cache"], facts["tokens_in"], tensors, model, pages)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise MemoryFileError(f"{folder} does not hold what its {CONTEXT} says: {error}") from error
    question = tensors.get("question")
    device = model.get_input_embeddings().weight.device
    question = None if question is None else question.to(device)
    return Memory(cache, facts["tokens_in"], here, question, source_of(folder, facts))


def _pages_of(folder: Path, facts: dict[str, Any]) -> SavedPages | None:
    if "pages" not in facts:
        return None
    name = facts["pages"]
    if not isinstance(name, str) or not PAGES.fullmatch(name):
        raise MemoryFileError(f"{folder / CONTEXT} names {name!r}, which is not a file that longfit writes")
    _check_hash(folder / name, facts.get("pages_sha256"))
    return SavedPages(folder / name)


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
