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
    setup_of,
)
from longfit.commands.runs import eval_, report, sweep, train
from longfit.commands.serve import serve


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


for command in (ask, compress, chat, info, serve, eval_, sweep, train, report):
    app.command(command.__name__.rstrip("_"))(command)


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


def main() -> None:
    """Entry point of `longfit`."""
    # PEFT asks transformers for a property by its old name; nothing that a user of the command line could do about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    app(prog_name="longfit")
