"""A grid of models, methods, budgets and tasks, in a folder that survives kills.

Each finished sample is one line on disk before the next one starts. Samples go block by block through all cells, so an
interrupted run has the same samples in all of them.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longfit.errors import InputError, LongfitError
from longfit.eval import records
from longfit.eval.answering import Reader, answer, wrapped
from longfit.eval.cells import Cell
from longfit.eval.conditions import conditions, environment, merged, resolved
from longfit.eval.processes import run_worker
from longfit.eval.recipe import Recipe
from longfit.eval.sample import Sample
from longfit.eval.shared_answering import answers
from longfit.eval.suites import get_task
from longfit.eval.summary import summarise
from longfit.eval.worker import Place, all_samples, load_reader, work


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

    data: a local folder with the suite's inputs; None takes the public ones.
    shard: "1/4" runs the first quarter of the samples of every cell; shards share one folder and may run at
        the same time. By default a process of `accelerate launch` takes the shard of its rank.
    limit: only the first samples of each task; the rest can be run later in the same folder.
    loaded: a model and its tokenizer, in place of loading the recipe's models; all cells then run in this process.

    Raises InputError where another sweep writes to the folder or the folder holds another recipe's run, and
    SweepError at the end where cells failed (``errors.jsonl`` has the tracebacks).
    """
    recipe, output = Recipe.read(recipe), Path(output)
    cells, part = recipe.expand(), shard_of(shard)
    suffix = f"-{part[0]}of{part[1]}" if part[1] > 1 else ""
    output.mkdir(parents=True, exist_ok=True)
    with records.locked(output, suffix) as locks:
        given = None if data is None else str(data)
        sweep = Sweep(recipe, cells, recipe.task_names(), output, given, part, suffix, limit, locks)
        for model in recipe.models:
            sweep.run_model(model, loaded)
        metrics = sweep.write_metrics()
    if sweep.failed:
        raise SweepError(f"{len(sweep.failed)} cells failed: {sweep.failed}; see {output / 'errors.jsonl'}")
    return metrics


@dataclass
class Sweep:
    """One start of a sweep: what it is to do and where."""

    recipe: Recipe
    cells: list[Cell]
    tasks: list[str]
    output: Path
    data: str | None
    part: tuple[int, int]
    suffix: str
    limit: int | None
    locks: list[int]
    failed: dict[str, str] = field(default_factory=dict)
    done: set[tuple[str, int, str, str]] = field(default_factory=set)

    def run_model(self, model: str, loaded: tuple[Any, Any] | None) -> None:
        """All lengths of one model."""
        reader = Reader(*loaded, self.recipe.max_new_tokens) if loaded else load_reader(self.recipe, model)
        config, samples = resolved(self.recipe, self.tasks), {}
        for length in self.recipe.lengths:
            samples[length] = all_samples(self.recipe, self.tasks, length, reader.tokenizer, self.data)
            config["conditions"][f"{model}@{length}"] = conditions(reader.model, reader.tokenizer, samples[length])
        text = yaml.safe_dump(merged(self.output, config), sort_keys=False, allow_unicode=True)
        records.write_atomically(self.output / "config.yaml", text)
        env = environment(self.recipe.threads, str(reader.model.device))
        records.write_atomically(self.output / f"env{self.suffix}.json", json.dumps(env, indent=1) + "\n")
        for stem in ("samples", "costs", "kept"):
            records.repair(self._file(stem))
        for length, by_task in samples.items():
            self._run_place(Place(model, length), reader, self._mine(by_task), alone=loaded is None)

    def _file(self, stem: str) -> Path:
        return self.output / f"{stem}{self.suffix}.jsonl"

    def _mine(self, by_task: dict[str, list[Sample]]) -> list[Sample]:
        """The shard's samples, in order of their index, the tasks in turn."""
        found = [s for given in by_task.values() for s in given if mine(s.index, self.part)]
        if self.limit is not None:
            found = [s for s in found if s.index < self.limit]
        return sorted(found, key=lambda s: (s.index, self.tasks.index(s.task)))

    def _missing(self, place: Place, cell: Cell, samples: list[Sample]) -> list[Sample]:
        """Samples without a record; none for a cell that has failed in this start."""
        if self._name(place, cell) in self.failed:
            return []
        key = (place.model, place.length, cell.cell_id)
        return [s for s in samples if (*key, s.sample_id) not in self.done]

    def _run_place(self, place: Place, reader: Reader, samples: list[Sample], alone: bool) -> None:
        self.done = {records.key_of(r) for r in records.read_records(self.output)}
        if self.recipe.shared_prefill:
            self._run_shared(place, reader, samples)
            self.done = {records.key_of(r) for r in records.read_records(self.output, "costs")}
            first = samples[: self.recipe.cost_samples] if self.part[0] == 1 else []
            self._run_cells(place, reader, first, "costs", alone)
        else:
            self._run_cells(place, reader, samples, "samples", alone)

    def _run_shared(self, place: Place, reader: Reader, samples: list[Sample]) -> None:
        """Sample by sample through every missing cell, from shared prefills."""
        progress = Progress(sum(bool([c for c in self.cells if self._missing(place, c, [s])]) for s in samples))
        mark = asdict(place)
        with self._file("samples").open("a") as log, self._file("kept").open("a") as kept_log:
            for sample in samples:
                task = get_task(self.recipe.suite, sample.task)
                todo = [cell for cell in self.cells if self._missing(place, cell, [sample])]
                for cell in todo:
                    if cell.baseline or cell.prefills_alone:
                        # This process has done other things: what it held at most says nothing about the cell.
                        with wrapped(reader.model, cell, tokenizer=reader.tokenizer) as model:
                            own = Reader(model, reader.tokenizer, reader.max_new_tokens)
                            line = answer(own, task, sample, cell)[0] | {"peak_bytes": None}
                        records.append(log, mark | line)
                ours = [cell for cell in todo if not (cell.baseline or cell.prefills_alone)]
                for line, kept in answers(reader, task, sample, ours, lambda c, e: self._fail(place, c, e)):
                    records.append(log, mark | line)
                    if kept is not None and sample.index == 0:
                        records.append(kept_log, mark | kept)
                if todo:
                    progress.step(f"{place.model}@{place.length} {sample.sample_id}, {len(todo)} cells")

    def _run_cells(self, place: Place, reader: Reader, samples: list[Sample], stem: str, alone: bool) -> None:
        """Block by block and cell by cell; each in a process of its own where `alone`."""
        size = self.recipe.block_samples * len(self.tasks)
        progress = Progress(sum(len(self._missing(place, cell, samples)) for cell in self.cells))
        for start in range(0, len(samples), size):
            for cell in self.cells:
                todo = self._missing(place, cell, samples[start : start + size])
                if not todo:
                    continue
                try:
                    if alone and self.recipe.fresh_process:
                        self._run_alone(place, cell, todo, stem)
                    else:
                        with self._file(stem).open("a") as log, self._file("kept").open("a") as kept_log:
                            work(reader, self.recipe, place, cell, todo, log, kept_log)
                except Exception as error:
                    self._fail(place, cell, error)
                progress.step(f"{place.model}@{place.length} {cell.cell_id}", len(todo))

    def _run_alone(self, place: Place, cell: Cell, samples: list[Sample], stem: str) -> None:
        job = {
            "recipe": asdict(self.recipe),
            "place": asdict(place),
            "cell": asdict(cell),
            "data": self.data,
            "samples": [[s.task, s.index] for s in samples],
            "log": str(self._file(stem)),
            "kept_log": str(self._file("kept")),
        }
        run_worker(job, self.output / f".job{self.suffix}.json", self.recipe.threads, self.locks)

    def _name(self, place: Place, cell: Cell) -> str:
        return f"{place.model}@{place.length} {cell.cell_id}"

    def _fail(self, place: Place, cell: Cell, error: Exception) -> None:
        """One broken method must not cost the night's run of the others: its cell stops, the rest goes on."""
        if isinstance(error, OSError):
            raise error
        self.failed[self._name(place, cell)] = (
            str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        )
        line = {"cell": self._name(place, cell), "error": str(error), "traceback": traceback.format_exception(error)}
        with (self.output / "errors.jsonl").open("a", encoding="utf-8") as log:
            records.append(log, line)

    def write_metrics(self) -> dict[str, Any]:
        found = records.read_records(self.output)
        metrics = {
            "name": self.recipe.name,
            "finished": len(found),
            "failed": self.failed,
            "rows": summarise(found, records.read_records(self.output, "costs")),
        }
        records.write_atomically(self.output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        return metrics


class Progress:
    """One line on stderr for each step, with the time that is left at the pace so far."""

    def __init__(self, total: int) -> None:
        self.total, self.finished, self.started = total, 0, time.monotonic()

    def step(self, what: str, steps: int = 1) -> None:
        self.finished += steps
        pace = (time.monotonic() - self.started) / self.finished
        left = max(0, self.total - self.finished)
        text = f"{what}: {pace:.1f} s each, {left} left, {pace * left / 60:.0f} min"
        print(text, file=sys.stderr, flush=True)


def shard_of(shard: str | None) -> tuple[int, int]:
    """ "2/4" as (2, 4); None is the rank of a process that `accelerate launch` started, else (1, 1)."""
    if shard is None:
        return int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InputError(f"shard {shard!r} is not of the form 1/4, with the first number from 1 to the second")
    return int(part), int(parts)


def mine(index: int, part: tuple[int, int]) -> bool:
    """Whether sample ``index`` belongs to the shard.

    Shifted from row to row: stratified depths go in van der Corput order, where every second sample is shallow.
    """
    number, parts = part
    return (index + index // parts) % parts == number - 1
