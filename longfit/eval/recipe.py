"""What a sweep's recipe (YAML) may say, and the cells that it spans."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from longfit.errors import InputError
from longfit.eval import needle
from longfit.eval.tables import BASELINES


@dataclass(frozen=True)
class Cell:
    """One way to answer: a method or baseline, the fraction of the context kept, the question seen or not."""

    method: str
    keep_ratio: float = 1.0
    awareness: str = "agnostic"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cell_id(self) -> str:
        if self.method in ("full", "no_context"):
            return self.method
        options = ",".join(f"{key}={self.options[key]}" for key in sorted(self.options))
        aware = "" if self.method in BASELINES else f"-{self.awareness}"
        return f"{self.method}{f'({options})' if options else ''}-{self.budget}{aware}"

    @property
    def budget(self) -> str:
        return f"{100 * self.keep_ratio:g}%"


@dataclass(frozen=True)
class Recipe:
    """What a sweep runs. ``cells`` is a list of groups: methods, keep_ratios and awareness, all combined.

    ``shared_prefill`` reads each sample once, in one chunk, and trims that prefill by every cell: what each
    method would do with a chunk that holds the whole sample, at a fraction of the time.

    A method is a name, or a mapping of one name to its options: ``{snapkv: {kernel_size: 7}}``.
    """

    name: str
    model: str
    length: int
    n: int
    cells: list[dict[str, Any]]
    tasks: list[str] = field(default_factory=lambda: list(needle.TASKS))
    dtype: str = "auto"
    threads: int = 1
    seed: int = 42
    chunk_tokens: int | None = None
    answer_prefix: bool = True
    max_new_tokens: int = needle.MAX_NEW_TOKENS
    block_samples: int = 5
    shared_prefill: bool = False

    @classmethod
    def read(cls, source: "str | Path | dict[str, Any] | Recipe") -> "Recipe":
        """From a YAML file or a mapping. Raises InputError for keys that are unknown or missing."""
        if isinstance(source, Recipe):
            return source
        if not isinstance(source, dict):
            if not Path(source).is_file():
                raise InputError(f"recipe {str(source)!r} does not exist")
            source = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        if not isinstance(source, dict):
            raise InputError("a recipe is a YAML mapping")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(source) - known):
            raise InputError(f"unknown recipe key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted({"name", "model", "length", "n", "cells"} - set(source)):
            raise InputError(f"the recipe lacks {', '.join(missing)}")
        return cls(**source)

    def expand(self) -> list[Cell]:
        """All cells, baselines first, each once. Raises InputError for a group that cannot be run."""
        found: dict[str, Cell] = {}
        for group in self.cells:
            if unknown := sorted(set(group) - {"methods", "keep_ratios", "awareness"}):
                raise InputError(f"unknown key {', '.join(unknown)} in a group of cells")
            for method, options in map(_method, group["methods"]):
                plain = method in ("full", "no_context")
                aware = ["agnostic"] if method in BASELINES else group.get("awareness") or _awareness(method, options)
                for ratio in [1.0] if plain else group["keep_ratios"]:
                    if not 0 < ratio <= 1:
                        raise InputError(f"keep_ratio {ratio} of {method} is not in (0, 1]")
                    for mode in aware:
                        if mode not in ("agnostic", "aware"):
                            raise InputError(f"awareness {mode!r} of {method}: use agnostic or aware")
                        cell = Cell(method, float(ratio), mode, options)
                        found.setdefault(cell.cell_id, cell)
        return sorted(found.values(), key=lambda cell: cell.method not in BASELINES)


def _method(entry: str | dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if len(entry) != 1:
        raise InputError(f"a method with options is a mapping of one name, not {entry}")
    return next(iter(entry.items()))


def _awareness(method: str, options: dict[str, Any]) -> list[str]:
    """Both ways for a method that looks at the question where it is known, else without it."""
    from longfit.compressors import get

    return ["agnostic", "aware"] if get(method, **options).query_aware else ["agnostic"]
