"""What a sweep's recipe (YAML) may say."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from longfit.errors import InputError
from longfit.eval.cells import Cell, expand
from longfit.yaml_file import read_mapping


@dataclass(frozen=True)
class Recipe:
    """A grid of models x compressors x budgets x tasks x lengths.

    Attributes:
        name: of the run.
        suite, tasks: which tasks; all of the suite where `tasks` is empty.
        models: as `longfit.load` takes them.
        lengths: tokens of a prompt with its longest answer.
        n: samples of each task at each length; seed: of the samples.
        cells: groups of `methods`, `keep_ratios` or `budgets`, `awareness` and `chunk_tokens`, all combined. A method
            is a name, or a mapping of one name to its options: `{snapkv: {kernel_size: 7}}`. A group may name
            `attention` in place of methods, or beside them; `read_tokens` are the sizes of those that have one.
        chat: use the tokenizer's chat template where it has one.
        max_new_tokens: in place of the task's own; recorded as a condition.
        shared_prefill: read each sample once, in one chunk, and trim that prefill by every cell: what each method does
            with a chunk that holds the whole sample, at a fraction of the time. Costs are then measured apart: each
            cell runs `cost_samples` samples alone, in a fresh process.
        fresh_process: run each cell's samples in a process of its own, so that its peak memory is its own.
        block_samples: samples that a cell answers before the next cell's turn, so that an interrupted run has the same
            samples in all of its cells.
        dtype, threads: of the run.
    """

    name: str
    models: list[str]
    lengths: list[int]
    n: int
    cells: list[dict[str, Any]]
    suite: str = "ruler"
    tasks: list[str] = field(default_factory=list)
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 42
    chat: bool = True
    max_new_tokens: int | None = None
    shared_prefill: bool = False
    cost_samples: int = 0
    fresh_process: bool = True
    block_samples: int = 25

    @classmethod
    def read(cls, source: "str | Path | dict[str, Any] | Recipe") -> "Recipe":
        """From a YAML file or a mapping. Raises InputError for keys that are unknown or missing."""
        if isinstance(source, Recipe):
            return source
        if not isinstance(source, dict):
            source = read_mapping(Path(source))
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(source) - known):
            raise InputError(f"unknown recipe key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted({"name", "models", "lengths", "n", "cells"} - set(source)):
            raise InputError(f"the recipe lacks {', '.join(missing)}")
        for name in ("models", "lengths", "tasks", "cells"):
            if name in source and not isinstance(source[name], list):
                raise InputError(f"{name} of the recipe is a list, not {source[name]!r}")
        if not isinstance(source["n"], int) or source["n"] < 1:
            raise InputError(f"n={source['n']}: ask for at least one sample")
        recipe = cls(**source)
        if recipe.shared_prefill and any("chunk_tokens" in group for group in recipe.cells):
            raise InputError("shared_prefill reads a sample in one chunk; leave chunk_tokens out, or shared_prefill")
        return recipe

    def expand(self) -> list[Cell]:
        """All cells, baselines first, each once. Raises InputError for a group that cannot be run."""
        return expand(self.cells)

    def task_names(self) -> list[str]:
        """The tasks by name, each known. Raises UnknownNameError."""
        from longfit.eval.suites import get_task, tasks_of

        return [get_task(self.suite, name).name for name in self.tasks] or list(tasks_of(self.suite))
