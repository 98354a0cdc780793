"""The samples of a sweep: generated once, then read from the cache folder by the hash of what made them."""

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from longfit.eval.records import write_atomically
from longfit.eval.sample import Prompt, Sample
from longfit.eval.task import Task
from longfit.folders import cache_folder


def samples_of(
    task: Task,
    tokenizer: Any,
    *,
    length: int,
    n: int,
    seed: int = 42,
    data: str | Path | None = None,
    chat: bool = True,
    cache: Path | None = None,
) -> list[Sample]:
    """`task.samples(...)`, from the cache folder where the same were made before.

    The cache key covers the task's source code, the tokenizer, the arguments and the names, sizes and times of the data
    files, so that a change of any of them makes new samples. A damaged file of the cache is made again.

    Args:
        cache: the folder; by default `eval` in longfit's cache folder.

    Raises:
        InputError: `length` is below what the task needs.
        DataError: a data file is missing or broken.
    """
    folder = cache or cache_folder() / "eval"
    key = _key(task, tokenizer, {"length": length, "n": n, "seed": seed, "chat": chat}, data)
    file = folder / f"{task.suite}-{task.name}-{length}-{key[:20]}.jsonl"
    if file.is_file() and (found := _read(file)) is not None:
        return found
    made = task.samples(tokenizer, length=length, n=n, seed=seed, data=data, chat=chat)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(sample), ensure_ascii=False) for sample in made]
    write_atomically(file, "\n".join([*lines, json.dumps({"samples": len(made)})]) + "\n")
    return _read(file) or made


def _read(file: Path) -> list[Sample] | None:
    """The samples, or None where the file is not whole."""
    try:
        *rows, end = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if end != {"samples": len(rows)}:
            return None
        return [_sample(row) for row in rows]
    except (ValueError, KeyError, TypeError):
        return None


def _sample(row: dict[str, Any]) -> Sample:
    prompt: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.pop("prompt").items()
    }
    row["answers"], row["target_ids"] = tuple(row["answers"]), tuple(row["target_ids"])
    return Sample(prompt=Prompt(**prompt), **row)


def _key(task: Task, tokenizer: Any, arguments: dict[str, Any], data: str | Path | None) -> str:
    parts = [task.suite, task.name, arguments, _sources(task), tokenizer_sha256(tokenizer), _data_state(data)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sources(task: Task) -> str:
    """Hash of the source files that a task's samples come from: its module, or its whole package, and the cut."""
    module = importlib.import_module(type(task).__module__)
    file = Path(module.__file__ or "")
    package = file.parent if file.parent.name != "eval" else None
    files = sorted(package.rglob("*.py")) + sorted(package.rglob("*.json")) if package else [file]
    digest = hashlib.sha256()
    for source in [*files, Path(__file__).with_name("sample.py")]:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer: its vocabulary and rules, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(f"{rules}\0{template}".encode()).hexdigest()


def _data_state(data: str | Path | None) -> list[Any]:
    if data is None:
        return []
    files = sorted(path for path in Path(data).rglob("*") if path.is_file())
    return [str(Path(data).resolve()), [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
