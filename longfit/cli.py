"""The command line: each command reads its options, calls one function and prints what it returns.

Exit codes: 0 done; 2 bad input (one line with the reason and what would work); 130 interrupted; 1 anything else.
Answers and tables go to stdout, progress and errors to stderr. Heavy imports wait until a command needs them.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longfit.commands.documents import ask, chat, compress, info, remembered
from longfit.commands.options import (
    Budget,
    ChunkTokens,
    Compressor,
    Data,
    Dtype,
    Json,
    Model,
    Options,
    Total,
    key_values,
    setup_of,
)
from longfit.commands.serve import serve
from longfit.units import DEFAULT_BUDGET


class Group(TyperGroup):
    """Commands whose errors end in one line on stderr and the exit code that belongs to them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
            raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int | None:
    """2 for what a user can cause, 1 for a failing system, None for a defect, which keeps its traceback."""
    # typer may carry its own copy of click: its usage errors are known by their shape.
    if hasattr(error, "format_message"):
        return 2
    if "longfit.errors" in sys.modules and isinstance(error, sys.modules["longfit.errors"].LongfitError):
        return 1 if type(error).__name__ == "SweepError" else 2
    return 1 if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) else None


app = typer.Typer(
    cls=Group,
    help="An input of any length for any Hugging Face causal LM, within one memory budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"longfit {version('longfit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    code: Annotated[
        list[Path] | None,
        typer.Option(
            "--code",
            envvar="LONGFIT_CODE",
            help="A Python file that defines compressors, patches or suites of your own; may be given again.",
        ),
    ] = None,
) -> None:
    if code:
        from longfit.user_code import VARIABLE, load_code

        load_code(code)
        os.environ[VARIABLE] = os.pathsep.join(str(file.resolve()) for file in code)  # for workers


for command in (ask, compress, chat, info, serve):
    app.command()(command)


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="compressors, attention, adapters, models, recipes or tasks")
    ] = "compressors",
    as_json: Json = False,
) -> None:
    """What there is: compressors, attention patches, adapters, models, recipes or tasks."""
    from longfit.listing import blocks, listing

    rows = listing(what)
    print(json.dumps(rows) if as_json else blocks(rows))


@app.command()
def plan(
    model: Model,
    tokens: Annotated[str, typer.Option("--tokens", "-t", help="Input tokens of a row: 4096 or 120k.")],
    budget: Budget = None,
    total: Total = None,
    compressor: Compressor = "snapkv",
    batch: Annotated[int, typer.Option("--batch", help="Rows.")] = 1,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    option: Options = None,
    as_json: Json = False,
) -> None:
    """Does an input fit, and what would be kept? Reads the model's configuration, never its weights."""
    from longfit.planning import planned

    parts = setup_of(model, dtype, compressor, None, option, budget, total, chunk_tokens).parts()
    made = planned(
        model,
        tokens,
        parts["compressor"],
        budget=parts["budget"],
        batch_size=batch,
        chunk_tokens=chunk_tokens,
        dtype=dtype,
    )
    print(json.dumps(made.to_dict()) if as_json else made)


@app.command()
def export(
    memory: Annotated[str, typer.Argument(help="A folder that `longfit compress` wrote.")],
    to: Annotated[str, typer.Option("--to", help="cartridge (PEFT) or vllm-prompt-embeds.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    as_json: Json = False,
) -> None:
    """A saved memory for another engine."""
    from longfit.export import exporter

    write = exporter(to)
    kept, loaded, _ = remembered(memory, not as_json)
    files = [str(file) for file in write(kept, loaded, output)]
    print(json.dumps({"files": files}) if as_json else "\n".join(files))


@app.command()
def demo(as_json: Json = False) -> None:
    """A small model answers from the middle of a long document with a quarter of the cache."""
    from longfit.demo.run import run

    result = run(lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True))
    if as_json:
        print(json.dumps(result.to_dict()))


@app.command()
def bench(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see `longfit list recipes`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Measure time and memory; each cell runs in a fresh process, and finished cells are not run again."""
    from longfit.bench import render, run

    result = run(recipe, output, data)
    print(json.dumps(result) if as_json else render(result))


@app.command("eval")
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


@app.command()
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


@app.command()
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
    print(json.dumps(result.to_dict()) if as_json else markdown(result.table))
    print(f"written: {result.adapter}", file=sys.stderr)


@app.command()
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


def main() -> None:
    """Entry point of `longfit`."""
    # PEFT asks transformers for a property by its old name; nothing that a user of the command line could do about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    app(prog_name="longfit")
