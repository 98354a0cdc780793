"""The samples of one cell, in this process: `python -m longfit.eval.worker JOB.json`, or `work` where it is at hand."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longfit.eval import records
from longfit.eval.answering import Reader, answer, wrapped
from longfit.eval.cells import Cell
from longfit.eval.inputs import samples_of
from longfit.eval.recipe import Recipe
from longfit.eval.sample import Sample
from longfit.eval.suites import get_task
from longfit.user_code import load_from_environment


@dataclass(frozen=True)
class Place:
    """One model at one length: what every record of it is marked with."""

    model: str
    length: int


def work(
    reader: Reader,
    recipe: Recipe,
    place: Place,
    cell: Cell,
    samples: list[Sample],
    log: Any,
    kept_log: Any = None,
    after: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Answer `samples` by `cell`, a line in `log` for each, and a map of what was kept for a task's first sample."""
    mark = {"model": place.model, "length": place.length}
    with wrapped(reader.model, cell, tokenizer=reader.tokenizer) as fitted:
        own = Reader(fitted, reader.tokenizer, reader.max_new_tokens)
        for sample in samples:
            line, kept = answer(own, get_task(recipe.suite, sample.task), sample, cell)
            records.append(log, mark | line)
            if kept is not None and kept_log is not None and sample.index == 0:
                records.append(kept_log, mark | kept)
            after(line)


def load_reader(recipe: Recipe, model: str) -> Reader:
    """The recipe's model and tokenizer, on the number of threads that it wants."""
    from longfit.loading import load

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    loaded, tokenizer = load(model, dtype=recipe.dtype, progress=False)
    return Reader(loaded, tokenizer, recipe.max_new_tokens)


def all_samples(recipe: Recipe, tasks: list[str], length: int, tokenizer: Any, data: str | None) -> dict[str, Any]:
    """Samples of every task at one length, by task.

    Raises:
        InputError, DataError: see `Task.samples`.
    """
    how: dict[str, Any] = {"length": length, "n": recipe.n, "seed": recipe.seed, "data": data, "chat": recipe.chat}
    return {name: samples_of(get_task(recipe.suite, name), tokenizer, **how) for name in tasks}


def main(job_file: str) -> None:
    """Run the job that the sweep wrote; end early where the sweep has gone."""
    load_from_environment()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    recipe, place, parent = Recipe.read(job["recipe"]), Place(**job["place"]), os.getppid()
    reader = load_reader(recipe, place.model)
    tasks = list(dict.fromkeys(task for task, _ in job["samples"]))
    found = all_samples(recipe, tasks, place.length, reader.tokenizer, job["data"])
    by_index = {(task, s.index): s for task, given in found.items() for s in given}

    def check_parent(record: dict[str, Any]) -> None:
        if os.getppid() != parent:
            sys.exit("the sweep that started this worker has ended")

    with open(job["log"], "a", encoding="utf-8") as log, open(job["kept_log"], "a", encoding="utf-8") as kept_log:
        chosen = [by_index[task, index] for task, index in job["samples"]]
        work(reader, recipe, place, Cell(**job["cell"]), chosen, log, kept_log, check_parent)


if __name__ == "__main__":
    main(sys.argv[1])
