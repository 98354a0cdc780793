"""What a run leaves: its adapter, and how good it is."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longfit.compressors.soft import LearnedCompressor, artifact
from longfit.loading import load
from longfit.training import checkpoint
from longfit.training.data import Source
from longfit.training.evaluate import evaluate_set, sets_of
from longfit.training.files import append_line, whole_folder
from longfit.training.recipe import Recipe
from longfit.training.student import Student

ADAPTER = "adapter"


def save_adapter(
    folder: Path,
    recipe: Recipe,
    compressor: LearnedCompressor,
    ratios: list[int],
    steps: int,
    seconds: float,
    results: str | None = None,
) -> None:
    """`folder`/adapter, as `compressors.soft.artifact` reads it; with `results`, a table, on its card."""
    given = {key: value for key, value in recipe.to_dict().items() if key not in ("trackers", "threads")}
    facts = {} if results is None else {"results": results}
    with whole_folder(folder / ADAPTER) as temporary:
        artifact.save(
            compressor,
            temporary,
            dtype=torch.bfloat16 if recipe.save_dtype == "bfloat16" else torch.float32,
            base_name=recipe.model,
            trained_ratios=sorted(set(ratios)),
            steps=steps,
            seconds=round(seconds, 1),
            recipe=given,
            **facts,
        )


def whole_compressor(recipe: Recipe, checkpoints: Path) -> LearnedCompressor:
    """The compressor on a model of its own, with the weights of the newest checkpoint: shards cannot be saved."""
    found = checkpoint.newest(checkpoints)
    assert found is not None
    model, _ = load(recipe.model, dtype=recipe.dtype, device="cpu", progress=False)
    compressor = recipe.make_compressor().bind(model)
    own = Student(compressor, recipe.loss_settings).trained()
    with torch.no_grad():
        for name, value in load_file(found[0] / checkpoint.WEIGHTS).items():
            own[name].copy_(value)
    return compressor


def small_table(
    recipe: Recipe, compressor: LearnedCompressor, mixture: list[tuple[float, Source]]
) -> list[dict[str, Any]]:
    """The rows of an evaluation in small, while training."""
    sets = sets_of([source for _, source in mixture])
    return [
        row for name in sets for row in _rows(recipe, compressor, name, sets[name], _lengths(recipe)[0], small=True)
    ]


def final_table(
    recipe: Recipe, compressor: LearnedCompressor, mixture: list[tuple[float, Source]], file: Path, steps: int
) -> list[dict[str, Any]]:
    """The rows of the evaluation at the end. Each set is on disk in `file` when it is done, and is not measured again
    after a kill."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    done = [json.loads(line) for line in lines if line.endswith("}")]
    known = {json.dumps(line["of"]): line["rows"] for line in done}
    rows: list[dict[str, Any]] = []
    for tokens in _lengths(recipe):
        for name, source in sets_of([source for _, source in mixture]).items():
            of = [name, tokens, steps, recipe.target_tokens, recipe.window_tokens, recipe.evaluation_settings.ratio]
            of.append(recipe.evaluation_settings.n)
            if (key := json.dumps(of)) not in known:
                known[key] = _rows(recipe, compressor, name, source, tokens, small=False)
                append_line(file, {"of": of, "rows": known[key]})
                print(f"evaluated: {name} at {tokens} tokens", file=sys.stderr)
            rows += known[key]
    return rows


def _rows(
    recipe: Recipe, compressor: LearnedCompressor, name: str, source: Source, tokens: int, small: bool
) -> list[dict[str, Any]]:
    settings = recipe.evaluation_settings
    return evaluate_set(
        compressor,
        name,
        source,
        n=settings.small if small else settings.n,
        context_tokens=tokens,
        target_tokens=recipe.target_tokens,
        ratio=settings.ratio or (recipe.final_ratios or [compressor.ratio])[0],
        batch_size=settings.batch_size,
        window_tokens=recipe.window_tokens,
    )


def _lengths(recipe: Recipe) -> list[int]:
    return recipe.evaluation_settings.context_tokens or [recipe.longest_context]


def in_short(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of a table for one line of metrics.jsonl, and for trackers."""
    return {f"eval/{row['set']}/{row['metric']}/{row['condition']}": round(row["mean"], 4) for row in rows}
