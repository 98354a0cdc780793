"""A grid of methods, keep ratios and question-awareness over needle samples, in a folder that survives kills.

Work goes block by block: a few samples through every cell, then the next few, so an interrupted run has
the same samples in all of its cells. Each finished sample is one line on disk before the next one starts.
"""

import hashlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from longfit.errors import InputError, LongfitError
from longfit.eval import needle
from longfit.eval.answering import answer, wrapped
from longfit.eval.needle import NeedleSample
from longfit.eval.recipe import Cell, Recipe
from longfit.eval.shared_answering import answers
from longfit.eval.tables import BASELINES, read_records, summarise, write_atomically


class SweepError(LongfitError, RuntimeError):
    """Cells of a sweep failed; the others are done, and the next start tries the failed ones again."""


def run(
    recipe: "str | Path | dict[str, Any] | Recipe",
    output: str | Path,
    *,
    data: str | Path | None = None,
    shard: str | None = None,
    limit: int | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Run what is missing of the grid in the folder ``output`` and return what ``metrics.json`` then holds.

    data: a local folder of text for the haystack (``needle.load_haystack``); None takes RULER's noise.
    shard: "1/4" runs the first quarter of the samples of every cell; shards share one folder and may run at
        the same time.
    limit: only the first samples of each task; the rest can be run later in the same folder.
    loaded: a model and its tokenizer, in place of loading ``recipe.model``.

    Raises InputError where another sweep writes to the folder or the folder holds another recipe's run, and
    SweepError at the end where cells failed (``errors.jsonl`` has the tracebacks).
    """
    recipe, output = Recipe.read(recipe), Path(output)
    cells, part = recipe.expand(), _shard(shard)
    suffix = f"-{part[0]}of{part[1]}" if part[1] > 1 else ""
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    with _locked(output, suffix):
        model, tokenizer = loaded or _load(recipe)
        samples = _samples(recipe, tokenizer, data)
        config = _config(recipe, model, tokenizer, samples, data)
        _check_same_run(output, config)
        write_atomically(output / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_atomically(output / f"env{suffix}.json", json.dumps(_environment(recipe, model), indent=1) + "\n")
        own = output / f"samples{suffix}.jsonl"
        _repair(own)
        chosen = [sample for sample in samples if _mine(sample.index, part)]
        if limit is not None:
            chosen = [sample for sample in chosen if sample.index < limit]
        with own.open("a", encoding="utf-8") as log:
            failed = _run_cells(recipe, cells, chosen, model, tokenizer, output, log)
        metrics = _write_metrics(output, recipe, cells, failed)
    if failed:
        raise SweepError(f"{len(failed)} of {len(cells)} cells failed: {failed}; see {output / 'errors.jsonl'}")
    return metrics


def _load(recipe: Recipe) -> tuple[Any, Any]:
    from longfit.loading import load

    return load(recipe.model, dtype=recipe.dtype)


def _samples(recipe: Recipe, tokenizer: Any, data: str | Path | None) -> list[NeedleSample]:
    """All samples of all tasks, in order of their index."""
    made = [
        needle.generate(
            task,
            tokenizer,
            length=recipe.length,
            n=recipe.n,
            seed=recipe.seed,
            data=data,
            answer_prefix=recipe.answer_prefix,
            max_new_tokens=recipe.max_new_tokens,
        )
        for task in recipe.tasks
    ]
    return [sample for row in zip(*made, strict=True) for sample in row]


def _run_cells(
    recipe: Recipe,
    cells: list[Cell],
    samples: list[NeedleSample],
    model: Any,
    tokenizer: Any,
    output: Path,
    log: IO[str],
) -> dict[str, str]:
    """Every missing (cell, sample), block by block. Returns the cells that failed, with the reason.

    One broken method must not cost the night's run of the others: its cell stops, the rest goes on.
    """
    done = {(record["cell"], record["sample"]) for record in read_records(output)}
    left = sum((cell.cell_id, sample.sample_id) not in done for cell in cells for sample in samples)
    finished, started, failed = 0, time.monotonic(), dict[str, str]()
    if recipe.shared_prefill:
        for _ in _run_shared(recipe, cells, samples, done, model, tokenizer, log):
            _write_metrics(output, recipe, cells, failed)
        return failed
    for first in range(0, recipe.n, recipe.block_samples):
        block = [sample for sample in samples if first <= sample.index < first + recipe.block_samples]
        for cell in cells:
            todo = [sample for sample in block if (cell.cell_id, sample.sample_id) not in done]
            if not todo or cell.cell_id in failed:
                left -= len(todo)
                continue
            right, tried = 0.0, 0
            try:
                with wrapped(model, cell, recipe.chunk_tokens) as ready:
                    for sample in todo:
                        record = answer(ready, tokenizer, sample, cell, recipe.max_new_tokens)
                        _append(log, record)
                        right, tried = right + record["correct"], tried + 1
            except Exception as error:  # reported below, in errors.jsonl and at the end
                failed[cell.cell_id] = f"{type(error).__name__}: {error}"
                with (output / "errors.jsonl").open("a", encoding="utf-8") as errors:
                    entry = {"cell": cell.cell_id, "error": failed[cell.cell_id]}
                    _append(errors, entry | {"trace": traceback.format_exc()})
                print(f"FAILED {cell.cell_id}: {failed[cell.cell_id]}", file=sys.stderr, flush=True)
            finished, left = finished + tried, left - len(todo)
            pace = (time.monotonic() - started) / max(1, finished)
            print(
                f"samples from {first}: {cell.cell_id} {right:g}/{tried} right, {pace:.1f} s a sample, "
                f"{left} left, {pace * left / 3600:.1f} h",
                file=sys.stderr,
                flush=True,
            )
            _write_metrics(output, recipe, cells, failed)
    return failed


def _run_shared(
    recipe: Recipe,
    cells: list[Cell],
    samples: list[NeedleSample],
    done: set[tuple[str, str]],
    model: Any,
    tokenizer: Any,
    log: IO[str],
) -> Iterator[None]:
    """Task by task and sample by sample through every missing cell, from shared prefills."""
    started = time.monotonic()
    for number, sample in enumerate(sorted(samples, key=lambda sample: recipe.tasks.index(sample.task))):
        todo = [cell for cell in cells if (cell.cell_id, sample.sample_id) not in done]
        for cell in todo:
            if cell.method in BASELINES:
                _append(log, answer(model, tokenizer, sample, cell, recipe.max_new_tokens))
        compressing = [cell for cell in todo if cell.method not in BASELINES]
        for record in answers(model, tokenizer, sample, compressing, recipe.max_new_tokens):
            _append(log, record)
        pace = (time.monotonic() - started) / (number + 1)
        left = len(samples) - number - 1
        print(
            f"{sample.sample_id}: {pace:.0f} s a sample, {left} left, {pace * left / 3600:.1f} h",
            file=sys.stderr,
            flush=True,
        )
        yield


def _write_metrics(output: Path, recipe: Recipe, cells: list[Cell], failed: dict[str, str]) -> dict[str, Any]:
    records = read_records(output)
    metrics = {
        "name": recipe.name,
        "planned": len(cells) * recipe.n * len(recipe.tasks),
        "finished": len(records),
        "failed": failed,
        "cells": summarise(records),
    }
    write_atomically(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def _append(log: IO[str], record: dict[str, Any]) -> None:
    """One line, on disk before the next sample starts."""
    log.write(json.dumps(record, ensure_ascii=False) + "\n")
    log.flush()
    os.fsync(log.fileno())


def _repair(file: Path) -> None:
    """Cut a last line that a kill left without its end; its sample runs again."""
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        with file.open("r+b") as log:
            log.truncate(content.rfind(b"\n") + 1)
            os.fsync(log.fileno())


@contextmanager
def _locked(output: Path, suffix: str) -> Iterator[None]:
    """One sweep per folder, or one per shard of it; the kernel frees the lock of a killed process."""
    import fcntl

    # Shards share the folder's lock, so that a whole run and a shard exclude each other too.
    wanted = [(output / ".lock", fcntl.LOCK_SH if suffix else fcntl.LOCK_EX)]
    wanted += [(output / f".lock{suffix}", fcntl.LOCK_EX)] if suffix else []
    with ExitStack() as stack:
        for file, kind in wanted:
            handle = stack.enter_context(file.open("a"))
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another sweep is writing to {str(output)!r}; wait for it or stop it") from error
        yield


def _shard(shard: str | None) -> tuple[int, int]:
    """ "2/4" as (2, 4); None is (1, 1)."""
    if shard is None:
        return 1, 1
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InputError(f"shard {shard!r} is not of the form 1/4, with the first number from 1 to the second")
    return int(part), int(parts)


def _mine(index: int, part: tuple[int, int]) -> bool:
    """Whether sample ``index`` belongs to the shard.

    Shifted from row to row: depths are visited in van der Corput order, where every second sample is shallow.
    """
    number, parts = part
    return (index + index // parts) % parts == number - 1


def _config(
    recipe: Recipe, model: Any, tokenizer: Any, samples: list[NeedleSample], data: str | Path | None
) -> dict[str, Any]:
    """The recipe as resolved, with hashes of all that decides a sample's outcome."""
    haystack = needle.load_haystack(data)
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        # A strided look at every tensor tells models apart without reading gigabytes.
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu().tolist()
        weights.update(repr((name, tuple(tensor.shape), str(tensor.dtype), values)).encode())
    template = getattr(tokenizer, "chat_template", None) or ""
    return asdict(recipe) | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "haystack": {"source": haystack.source, "sha256": haystack.sha256},
        "samples_sha256": hashlib.sha256("".join(sample.sha256 for sample in samples).encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
        "decoding": "greedy, to the first 7-digit number",
    }


def _check_same_run(output: Path, config: dict[str, Any]) -> None:
    """A folder holds one run: more cells may come, anything that changes an outcome may not."""
    file = output / "config.yaml"
    if not file.is_file():
        return
    old = yaml.safe_load(file.read_text(encoding="utf-8"))
    free = {"cells", "name", "threads", "block_samples"}
    if changed := sorted(key for key in config if key not in free and old.get(key) != config[key]):
        raise InputError(f"{str(output)!r} holds a run with another {', '.join(changed)}; give another folder")


def _environment(recipe: Recipe, model: Any) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("longfit", "torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": recipe.threads,
        "device": str(model.device),
        "attention": getattr(model.config, "_attn_implementation", None),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
