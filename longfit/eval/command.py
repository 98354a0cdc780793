"""`longfit eval`: from its options to a sweep in a folder, or to lm-eval."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longfit.errors import InputError, UnknownNameError
from longfit.eval.recipe import Recipe
from longfit.units import parse_tokens

QUESTIONS = {"agnostic": ["agnostic"], "aware": ["aware"], "both": None}


@dataclass(frozen=True)
class Asked:
    """The command's options; see `longfit eval --help`."""

    suite: str
    tasks: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ("4096",)
    n: int = 20
    model: str = "smollm2-135m"
    compressors: tuple[str, ...] = ("snapkv",)
    options: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ("25%",)
    question: str = "both"
    chunk_tokens: int | None = None
    attention: tuple[str, ...] = ()
    read_tokens: tuple[str, ...] = ("128",)
    data: str | None = None
    dtype: str = "auto"
    seed: int = 42
    chat: bool = True


def recipe_of(asked: Asked) -> Recipe:
    """The recipe that the options spell out.

    Raises:
        InputError: an option that cannot be used.
        UnknownNameError: an unknown method, suite or task.
    """
    from longfit.compressors import get

    if asked.question not in QUESTIONS:
        raise InputError(f"question {asked.question!r}; it is agnostic, aware or both")
    if asked.options and len(asked.compressors) != 1:
        raise InputError("--option goes to one compressor; name one, or write a recipe for `longfit sweep`")
    methods = [name for name in asked.compressors if name != "full"]
    for name in methods:
        get(name, **asked.options)
    cells: list[dict[str, Any]] = [{"methods": ["full", "no_context"]}]
    if methods:
        budgets = list(asked.budgets)
        entries = [{name: asked.options} if asked.options else name for name in methods]
        group: dict[str, Any] = {"methods": entries, "budgets": budgets}
        if (modes := QUESTIONS[asked.question]) is not None:
            group["awareness"] = modes
        if asked.chunk_tokens is not None:
            group["chunk_tokens"] = asked.chunk_tokens
        cells += [{"methods": ["truncate"], "budgets": budgets}, group]
    if asked.attention:
        sizes = [parse_tokens(size) for size in asked.read_tokens]
        sized = [name for name in asked.attention if _has_size(name)]
        unsized = [name for name in asked.attention if name not in sized]
        cells += [{"attention": sized, "read_tokens": sizes}] if sized else []
        cells += [{"attention": unsized}] if unsized else []
    recipe = Recipe.read(
        {
            "name": f"{asked.suite} on {asked.model}",
            "suite": asked.suite,
            "tasks": list(asked.tasks),
            "models": [asked.model],
            "lengths": [parse_tokens(length) for length in asked.lengths],
            "n": asked.n,
            "cells": cells,
            "dtype": asked.dtype,
            "seed": asked.seed,
            "chat": asked.chat,
        }
    )
    recipe.task_names()
    recipe.expand()
    return recipe


def _has_size(name: str) -> bool:
    """Whether the attention patch has a size in tokens read. Raises UnknownNameError."""
    from longfit.attention import get

    try:
        type(get(name)).reading(128)
    except UnknownNameError:
        raise
    except InputError:
        return False
    return True


def evaluate(asked: Asked, output: Path) -> tuple[dict[str, Any], str]:
    """Run what was asked in the folder ``output``: (metrics for --json, text to print)."""
    if asked.suite == "lm-eval":
        return _lm_eval(asked, output)
    from longfit.eval.report import report
    from longfit.eval.sweep import run

    metrics = run(recipe_of(asked), output, data=asked.data)
    return metrics, report(output).markdown


def _lm_eval(asked: Asked, output: Path) -> tuple[dict[str, Any], str]:
    from longfit.eval.lm_eval import run

    if not asked.tasks:
        raise InputError("lm-eval needs --tasks; `lm-eval ls tasks` lists its own")
    if len(asked.compressors) != 1 or len(asked.budgets) != 1 or asked.question == "both":
        raise InputError("lm-eval runs one cell: give one compressor, one budget, and --question agnostic or aware")
    plain = asked.compressors == ("full",)
    results = run(
        list(asked.tasks),
        asked.model,
        None if plain else asked.compressors[0],
        None if plain else asked.budgets[0],
        aware=asked.question == "aware",
        options=asked.options or None,
        chunk_tokens=asked.chunk_tokens,
        dtype=asked.dtype,
        limit=asked.n,
        metadata={"max_seq_lengths": [parse_tokens(length) for length in asked.lengths]},
        chat=asked.chat,
        seed=asked.seed,
        output=output / "lm_eval.json",
    )
    return results, json.dumps(results.get("results", {}), indent=1, default=str)
