"""Options that several commands share, and what is made of them."""

import json
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="Packaged name, folder, GGUF file or hub id; see `list models`.")
]
Compressor = Annotated[str, typer.Option("--compressor", "-c", help="A method; see `longfit list`.")]
Attention = Annotated[
    str | None, typer.Option("--attention", "-a", help="In place of full attention; see `longfit list attention`.")
]
Budget = Annotated[
    str | None, typer.Option("--budget", "-b", help="For the cache: 64MiB, '2048 tokens' (per layer) or 25%.")
]
Total = Annotated[
    str | None, typer.Option("--total", help="For everything, weights included: 2GiB; instead of --budget.")
]
ChunkTokens = Annotated[
    int | None, typer.Option("--chunk-tokens", help="Tokens of one chunk of prefill; chosen if left out.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="key=value of the compressor, or of an attention alone; may be given again."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Data = Annotated[str | None, typer.Option("--data", help="A local folder of text to make inputs from.")]


def key_values(options: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs; a value that is JSON (a number, say) is read as such."""
    from longfit.errors import InputError

    given: dict[str, Any] = {}
    for pair in options or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--option {pair!r} is not key=value, such as window=32")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return given


def setup_of(
    model: str,
    dtype: str,
    compressor: str | None,
    attention: str | None,
    option: list[str] | None,
    budget: str | None,
    total: str | None,
    chunk_tokens: int | None,
) -> Any:
    """How a command says that a model is to be loaded and wrapped."""
    from longfit.docqa import Setup

    return Setup(model, dtype, compressor, attention, key_values(option), budget, total, chunk_tokens)
