"""What a run leaves: its adapter, and how good it is."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longfit.compressors.soft import LearnedCompressor, artifact
from longfit.loading import load
from longfit.training import checkpoint
from longfit.training.data import Source
from longfit.training.evaluate import evaluate
from longfit.training.files import whole_folder
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


def table(
    recipe: Recipe, compressor: LearnedCompressor, mixture: list[tuple[float, Source]], small: bool
) -> list[dict[str, Any]]:
    """The rows of `evaluate` as the recipe wants them: at the end, or in small."""
    settings = recipe.evaluation_settings
    lengths = settings.context_tokens or [recipe.longest_context]
    ratio = settings.ratio or (recipe.ratios or [compressor.ratio])[0]
    rows: list[dict[str, Any]] = []
    for tokens in lengths[:1] if small else lengths:
        rows += evaluate(
            compressor,
            [source for _, source in mixture],
            n=settings.small if small else settings.n,
            context_tokens=tokens,
            target_tokens=recipe.target_tokens,
            ratio=ratio,
            batch_size=settings.batch_size,
            window_tokens=recipe.window_tokens,
        )
    return rows


def in_short(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of a table for one line of metrics.jsonl, and for trackers."""
    shown = {f"{row['set']}/{row['metric']}/{row['condition']}": round(row["mean"], 4) for row in rows}
    return {"evaluation": shown, **{f"eval/{name}": value for name, value in shown.items()}}
