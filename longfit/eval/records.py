"""A run folder's lines: appended one by one, repaired after a kill, read once each."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from longfit.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def append(log: IO[str], record: dict[str, Any]) -> None:
    """One line, on disk before the next sample starts."""
    log.write(json.dumps(record, ensure_ascii=False) + "\n")
    log.flush()
    os.fsync(log.fileno())


def repair(file: Path) -> None:
    """Cut a last line that a kill left without its end; its sample runs again."""
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        with file.open("r+b") as log:
            log.truncate(content.rfind(b"\n") + 1)
            os.fsync(log.fileno())


def key_of(record: dict[str, Any]) -> tuple[str, int, str, str]:
    """What tells one record of a run from another: (model, length, cell, sample)."""
    return record["model"], record["length"], record["cell"], record["sample"]


def read_records(folder: Path, stem: str = "samples") -> list[dict[str, Any]]:
    """Every finished line of ``stem``*.jsonl, of all shards, once per `key_of`.

    A last line without an end is being written, or was cut by a kill, and does not count.
    Raises InputError where a whole line is not a record.
    """
    records: dict[tuple[str, int, str, str], dict[str, Any]] = {}
    for file in sorted(folder.glob(f"{stem}*.jsonl")):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records.setdefault(key_of(record), record)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file.name} line {number} is damaged ({error}); remove the line") from error
    return list(records.values())


@contextmanager
def locked(output: Path, suffix: str) -> Iterator[list[int]]:
    """One sweep per folder, or one per shard of it; the kernel frees the lock when the last holder has ended.

    Yields the file descriptors that hold it: a child process that inherits them holds it too.

    Raises:
        InputError: another sweep is writing there.
    """
    import fcntl

    # Shards share the folder's lock, so that a whole run and a shard exclude each other too.
    wanted = [(output / ".lock", fcntl.LOCK_SH if suffix else fcntl.LOCK_EX)]
    wanted += [(output / f".lock{suffix}", fcntl.LOCK_EX)] if suffix else []
    held = []
    with ExitStack() as stack:
        for file, kind in wanted:
            handle = stack.enter_context(file.open("a"))
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another sweep is writing to {str(output)!r}; wait for it or stop it") from error
            held.append(handle.fileno())
        yield held
