"""What fills a run's folder and reads it: `longfit eval`, `sweep`, `train` and `report`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from longfit.commands.options import ChunkTokens, Data, Dtype, Json, Model, Options, key_values
from longfit.units import DEFAULT_BUDGET


def eval_(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; started again, it goes on.")],
    suite: Annotated[str, typer.Option("--suite", "-s", help="See `longfit list tasks`; or lm-eval.")] = "ruler",
    tasks: Annotated[str | None, typer.Option("--tasks", help="a,b,c; all of the suite if left out.")] = None,
    length: Annotated[str, typer.Option("--length", help="Tokens of a prompt with its answer: 4096,8k.")] = "4096",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Samples of each task.")] = 20,
    model: Model = "smollm2-135m",
    compressor: Annotated[
        str | None,
        typer.Option("--compressor", "-c", help="Methods, a,b,c; see `longfit list`. `full` alone: none."),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", "-b", help="25%,10% or '512 tokens' or 64MiB.")] = DEFAULT_BUDGET,
    question: Annotated[str, typer.Option("--question", help="agnostic, aware or both.")] = "both",
    chunk_tokens: ChunkTokens = None,
    attention: Annotated[
        str | None, typer.Option("--attention", "-a", help="Attention patches, a,b,c, alone, beside the methods.")
    ] = None,
    read_tokens: Annotated[
        str, typer.Option("--read-tokens", help="Stored tokens that they attend to a step: 64,128.")
    ] = "128",
    option: Options = None,
    data: Data = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the samples.")] = 42,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template, where there is one.")] = True,
    as_json: Json = False,
) -> None:
    """Score methods on a suite beside the full cache, no context and truncation; then print the tables."""
    from longfit.eval.command import Asked, evaluate

    given = Asked(
        suite=suite,
        tasks=tuple(filter(None, (tasks or "").split(","))),
        lengths=tuple(length.split(",")),
        n=limit,
        model=model,
        compressors=tuple((compressor or ("full" if attention else "snapkv")).split(",")),
        options=key_values(option),
        budgets=tuple(budget.split(",")),
        question=question,
        chunk_tokens=chunk_tokens,
        attention=tuple(filter(None, (attention or "").split(","))),
        read_tokens=tuple(read_tokens.split(",")),
        data=data,
        dtype=dtype,
        seed=seed,
        chat=chat,
    )
    result, text = evaluate(given, output)
    print(json.dumps(result) if as_json else text)
    print(f"written: {output}", file=sys.stderr)


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see `longfit list recipes`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; started again, it goes on.")],
    data: Data = None,
    shard: Annotated[str | None, typer.Option("--shard", help="1/2: the first half of each cell.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first samples of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Run a grid of models, methods, budgets and tasks; finished samples are not run again."""
    from longfit.eval.sweep import run

    metrics = run(recipe, output, data=data, shard=shard, limit=limit)
    if as_json:
        print(json.dumps(metrics))
    else:
        print(f"done; the tables and plots: longfit report {output}", file=sys.stderr)


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see `longfit list recipes`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder, else runs/NAME; started again, it goes on."),
    ] = None,
    data: Data = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Of training, all starts together, in place of the recipe's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a learned compressor; `accelerate launch -m longfit train ...` for several GPUs."""
    from longfit.training import run
    from longfit.training.recipe import Recipe
    from longfit.training.report import markdown

    wanted = Recipe.read(recipe)
    if max_seconds is not None:
        wanted = wanted.within(max_seconds)
    result = run(wanted, output, data=data, quiet=as_json)
    print(
        json.dumps(result.to_dict())
        if as_json
        else markdown(result.table)
        if result.table
        else "nothing was evaluated (evaluation: {n: 0})"
    )
    print(f"written: {result.adapter}", file=sys.stderr)


def report(
    run: Annotated[Path | None, typer.Argument(help="The folder of a sweep.")] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="A second run, to stand beside it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; the run folder.")] = None,
    memory: Annotated[
        Path | None, typer.Option("--memory", help="A memory instead: its text, shaded by what was kept (HTML, PNG).")
    ] = None,
) -> None:
    """Tables (Markdown, CSV), plots (PNG, SVG) and one HTML page of a sweep, or two runs side by side; or what a memory
    kept of its text."""
    from longfit.errors import InputError

    if (run is None) == (memory is None) or (memory is not None and compare is not None):
        raise InputError("give the folder of a sweep, or --memory and the folder of a memory")
    if memory is not None:
        from longfit.docqa.kept_report import report as kept_report

        files = kept_report(memory, output or memory.parent)
        print("\n".join(str(file) for file in files))
        return
    from longfit.eval import report as reports

    assert run is not None
    made = reports.report(run, output) if compare is None else reports.compare(run, compare, output or run)
    print(made.markdown)
    print(f"written: {', '.join(str(file) for file in made.files)}", file=sys.stderr)
