"""Files and folders that appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` in one rename when the block ends well; nothing otherwise.

    What killed processes left of the same target is tidied up first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tidy(target.parent, target.name)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = target.parent / f".{target.name}.{os.getpid()}.old"
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tidy(folder: Path, name: str = "*") -> None:
    """Clear away what `whole_folder` of killed processes left in `folder`, of the target `name` or of all.

    Half-written folders go. A target that was set aside for its successor comes back where the successor did not get
    its name. What belongs to another process that runs is left alone.
    """
    for path in folder.glob(f".{name}.*"):
        target, _, rest = path.name[1:].rpartition(".")[0].rpartition(".")
        kind = path.suffix.removeprefix(".")
        if kind not in ("tmp", "old") or not rest.isdigit() or not path.is_dir() or _runs_elsewhere(int(rest)):
            continue
        with suppress(OSError):  # several processes of one run may tidy up at once
            if kind == "old" and not (folder / target).exists():
                path.rename(folder / target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    """Whether another process has this id. The own one is a former process's: whoever tidies up writes nothing yet."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")
        log.flush()
        os.fsync(log.fileno())


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and one that a kill cut."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(f"{line}\n" for line in kept))
