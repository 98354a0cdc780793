"""The server's documents: memories in RAM up to a limit, all of them on disk, nothing lost when the process ends."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from filelock import FileLock, Timeout

from longfit.docqa.document import Document
from longfit.docqa.server.errors import ApiError
from longfit.docqa.server.record import FAILED, READY, Record, store, stored
from longfit.docqa.server.settings import ServerSettings
from longfit.errors import InputError
from longfit.memory import Memory
from longfit.units import format_bytes

logger = logging.getLogger("longfit.serve")


class Library:
    """Records by id, and the memories that are in RAM, least recently used first.

    A memory is written before it counts as there, so to make room is to forget it. Only the worker's thread loads and
    adds memories; records are looked at and removed by other threads too.

    Args:
        fingerprint: of the wrapped model and its budget: what makes one memory of a document differ from another.

    Raises:
        InputError: the state folder cannot be made, or another server works on it.
    """

    def __init__(self, settings: ServerSettings, fingerprint: dict[str, str]) -> None:
        self.limit, self.fingerprint = settings.memory_limit, fingerprint
        self.home = settings.state / "documents"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._file_lock = FileLock(settings.state / ".lock", thread_local=False)
            self._file_lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another server works on {settings.state}; give this one another --state") from error
        except OSError as error:
            raise InputError(f"{settings.state} cannot be used: {error.strerror or error}") from error
        self._lock = threading.RLock()
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._reserved = 0
        self.most_bytes = 0
        found, unreadable = stored(self.home)
        for name in unreadable:
            logger.warning("%s in %s cannot be read and is left as it is", name, self.home)
        for record in found:
            record.settle(fingerprint)
        self._records = {record.id: record for record in found}

    def close(self) -> None:
        """Forget the memories and let another server have the folder."""
        with self._lock:
            self._memories.clear()
        self._file_lock.release()

    # -- records --------------------------------------------------------------------------------------------------

    @property
    def records(self) -> list[Record]:
        """Oldest first."""
        with self._lock:
            return list(self._records.values())

    def record(self, id: str) -> Record:
        """
        Raises:
            ApiError: 404, there is none.
        """
        with self._lock:
            found = self._records.get(id)
        if found is None:
            raise ApiError(404, f"there is no document {id!r}; see /v1/documents", "document_not_found", "document")
        return found

    def add(self, documents: Sequence[Document], size: int) -> Record:
        """Store documents of `size` bytes, to be compressed.

        Raises:
            OSError: no room on the disk.
        """
        record = store(self.home, documents, size)
        with self._lock:
            self._records[record.id] = record
        return record

    def remove(self, id: str) -> None:
        """Take a document away, from RAM and from the disk.

        Raises:
            ApiError: 404, there is none.
        """
        with self._lock:
            record = self.record(id)
            record.remove()
            del self._records[id]
            self._memories.pop(id, None)

    def __contains__(self, id: str) -> bool:
        with self._lock:
            return id in self._records

    # -- memories -------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Of all caches now: memories in RAM, and what is reserved for work."""
        with self._lock:
            return self._reserved + sum(memory.kv_bytes for memory in self._memories.values())

    def in_memory(self, id: str) -> bool:
        """Whether a document's memory is in RAM."""
        with self._lock:
            return id in self._memories

    def reserve(self, size: int, keep: str | None = None) -> "Reservation":
        """Room for `size` bytes of work, for as long as the `with` lasts; memories make way, least recently used first.

        Args:
            keep: the document that is worked on.

        Raises:
            ApiError: 413, it does not fit the limit whatever is forgotten.
        """
        with self._lock:
            self._make_room(size, keep)
            self._reserved += size
            self.most_bytes = max(self.most_bytes, self.bytes)
        return Reservation(self, size)

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        with self._lock:
            self._reserved -= size

    def memory(self, record: Record, model: Any) -> Memory:
        """A document's memory, from RAM or from the disk.

        Raises:
            ApiError: 404, the document was removed; 413, it does not fit the limit.
            MemoryFileError: it is not there, or it was changed.
        """
        with self._lock:
            found = self._memories.get(record.id)
            if found is not None:
                self._memories.move_to_end(record.id)
                return found
        size = int((record.facts or {}).get("kv_bytes", 0))
        with self.reserve(size):
            found = Memory.load(record.memory_folder(self.fingerprint), model)
        self.keep(record, found)
        return found

    def keep(self, record: Record, memory: Memory) -> None:
        """Put a memory that is on disk in RAM.

        Raises:
            ApiError: 404, the document was removed meanwhile; 413, it does not fit the limit.
        """
        with self._lock:
            self.record(record.id)
            self._make_room(memory.kv_bytes, record.id)
            self._memories[record.id] = memory
            self.most_bytes = max(self.most_bytes, self.bytes)

    def fail(self, record: Record, error: ApiError) -> None:
        """A document that cannot be compressed stays, with the reason, until it is removed."""
        with self._lock:
            record.status, record.error = FAILED, error.body["error"]

    def ready(self, record: Record, facts: dict[str, Any]) -> None:
        """A document can be asked."""
        with self._lock:
            record.status, record.facts, record.error = READY, facts, None

    def _make_room(self, size: int, keep: str | None) -> None:
        others = [id for id in self._memories if id != keep]
        while self.bytes + size > self.limit and others:
            del self._memories[others.pop(0)]
        if self.bytes + size > self.limit:
            raise ApiError(
                413,
                f"this takes {format_bytes(self.bytes + size)} of caches, and the server's memory limit is "
                f"{format_bytes(self.limit)}: start it with a smaller --budget or a larger --memory-limit",
                "memory_limit",
            )


class Reservation:
    """Room that is given back at the end of a `with`."""

    def __init__(self, library: Library, size: int) -> None:
        self.library, self.size = library, size

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.library.release(self.size)
