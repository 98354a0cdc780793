"""RULER's inputs from their public sources, kept in longfit's cache folder."""

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from longfit.errors import DataError
from longfit.folders import cache_folder
from longfit.packaged import PARTIAL_SUFFIX

ESSAYS_DATASET = "baber/paul_graham_essays"
URLS = {
    "squad.json": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    "hotpotqa.json": "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
    "english_words.json": (
        "https://media.githubusercontent.com/media/NVIDIA/RULER/main/scripts/data/synthetic/json/english_words.json"
    ),
}
TIMEOUT_SECONDS = 60


def source_of(name: str) -> str:
    """Where the input file ``name`` is published."""
    return URLS.get(name, f"the dataset {ESSAYS_DATASET} of the Hugging Face Hub")


def downloaded(name: str, shape: str) -> Path:
    """The input file ``name`` in the cache folder, fetched on the first call; it appears in one rename.

    Args:
        shape: the file's format, for the message of a failure.

    Raises:
        DataError: it cannot be fetched or kept; says what to put where.
    """
    folder = cache_folder() / "data" / "ruler"
    file = folder / name
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch: Callable[[], bytes] = (lambda: _fetched(URLS[name])) if name in URLS else _essays
        _write(file, fetch())
    except (OSError, ValueError, ImportError, urllib.error.URLError) as error:
        raise DataError(
            f"cannot download {name} from {source_of(name)}: {error}. Put the file ({shape}) into {folder}, or give a "
            f"data folder that has it as ruler/{name} or {name}"
        ) from error
    return file


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        content: bytes = answer.read()
    json.loads(content)  # an error page or a Git LFS pointer is not kept
    return content


def _essays() -> bytes:
    """The essays of the Hub's data set in RULER's format, joined by a blank."""
    import pyarrow.parquet
    from huggingface_hub import HfApi, hf_hub_download

    files = sorted(f for f in HfApi().list_repo_files(ESSAYS_DATASET, repo_type="dataset") if f.endswith(".parquet"))
    if not files:
        raise ValueError("the data set has no parquet file any more")
    texts: list[str] = []
    for file in files:
        path = hf_hub_download(ESSAYS_DATASET, file, repo_type="dataset")
        texts += pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    return json.dumps({"text": " ".join(texts)}).encode()


def _write(file: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=file.name, suffix=PARTIAL_SUFFIX, dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
