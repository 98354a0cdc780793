"""One document of the server, and its folder."""

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.docqa.document import Document, Page
from longfit.errors import MemoryFileError
from longfit.memory_file import information, is_memory

ID = re.compile(r"doc-[0-9a-f]{24}")
RECORD, DOCUMENTS = "record.json", "documents.json"
COMING, GOING = ".coming-", ".going-"
QUEUED, COMPRESSING, READY, FAILED = "queued", "compressing", "ready", "failed"


@dataclass
class Record:
    """What the server knows of a document (one upload; it may be several files).

    Its folder holds `record.json`, `documents.json` (the text, whatever becomes of the memory) and for each model and
    method that compressed it a memory and a picture of what that kept. Ids and paths are the server's own; what a
    client calls a document is shown and never opened.

    Attributes:
        id: `doc-` and 24 digits.
        folder: where it is kept.
        names: of its files.
        bytes, characters, pages: of its files together.
        created_at: seconds since 1970.
        status: "queued", "compressing", "ready" or "failed".
        error: why it failed.
        facts: of its memory: tokens_in, kept_tokens, kv_bytes, full_kv_bytes, seconds; while it is being compressed
            also tokens_done, and what is expected in place of what is not known yet.
    """

    id: str
    folder: Path
    names: tuple[str, ...]
    bytes: int
    characters: int
    pages: int
    created_at: float
    status: str = QUEUED
    error: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None

    def to_dict(self, in_memory: bool) -> dict[str, Any]:
        """What a client sees."""
        return {
            "id": self.id,
            "object": "document",
            "name": ", ".join(self.names),
            "files": list(self.names),
            "bytes": self.bytes,
            "characters": self.characters,
            "pages": self.pages or None,
            "created_at": int(self.created_at),
            "status": self.status,
            "error": self.error,
            "in_memory": in_memory,
            **(self.facts or {}),
        }

    def memory_folder(self, fingerprint: dict[str, str]) -> Path:
        """Where the memory is that a model and method made."""
        return self.folder / f"memory-{_key(fingerprint)}"

    def picture_file(self, fingerprint: dict[str, str]) -> Path:
        """Where the picture is of what that memory kept."""
        return self.folder / f"kept-{_key(fingerprint)}.json"

    def documents(self) -> list[Document]:
        """The text.

        Raises:
            MemoryFileError: it cannot be read.
        """
        try:
            given = json.loads((self.folder / DOCUMENTS).read_text(encoding="utf-8"))
            return [Document(d["name"], d["text"], tuple(Page(*page) for page in d["pages"])) for d in given]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise MemoryFileError(f"the text of {self.id} cannot be read: {error}") from error

    def settle(self, fingerprint: dict[str, str]) -> None:
        """Look into the folder whether the memory of this model and method is there."""
        folder = self.memory_folder(fingerprint)
        if not is_memory(str(folder)):
            return
        try:
            about = information(folder)["about"]
        except MemoryFileError:
            return
        if isinstance(about.get("served"), dict):
            self.status, self.facts = READY, about["served"]

    def remove(self) -> None:
        """Take the folder away: it is gone at once, and its bytes soon after."""
        going = self.folder.with_name(f"{GOING}{self.id}-{secrets.token_hex(4)}")
        self.folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def clear(self) -> None:
        """Take away what is in the folder of a document that was removed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def store(home: Path, documents: Sequence[Document], size: int) -> Record:
    """A new record with its folder, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    made = f"doc-{secrets.token_hex(12)}"
    known = {
        "names": [document.name for document in documents],
        "bytes": size,
        "characters": sum(len(document.text) for document in documents),
        "pages": sum(len(document.pages) for document in documents),
        "created_at": time.time(),
    }
    text = [{"name": d.name, "text": d.text, "pages": [[p.number, p.start, p.end] for p in d.pages]} for d in documents]
    coming = home / f"{COMING}{made}"
    try:
        coming.mkdir()
        (coming / DOCUMENTS).write_text(json.dumps(text), encoding="utf-8")
        (coming / RECORD).write_text(json.dumps(known), encoding="utf-8")
        coming.rename(home / made)
    except BaseException:
        shutil.rmtree(coming, ignore_errors=True)
        raise
    return _record(home / made, known)


def stored(home: Path) -> tuple[list[Record], list[str]]:
    """The records of a folder, oldest first, and the names of what cannot be read. What a crash left half done goes."""
    found, unreadable = [], []
    for folder in sorted(home.iterdir()):
        if folder.name.startswith((COMING, GOING)):
            shutil.rmtree(folder, ignore_errors=True)
        elif ID.fullmatch(folder.name):
            try:
                found.append(_record(folder, json.loads((folder / RECORD).read_text(encoding="utf-8"))))
            except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError):
                unreadable.append(folder.name)
    return sorted(found, key=lambda record: (record.created_at, record.id)), unreadable


def _record(folder: Path, known: dict[str, Any]) -> Record:
    return Record(
        folder.name,
        folder,
        names=tuple(map(str, known["names"])),
        bytes=int(known["bytes"]),
        characters=int(known["characters"]),
        pages=int(known["pages"]),
        created_at=float(known["created_at"]),
    )


def _key(fingerprint: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
