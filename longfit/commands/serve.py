"""`longfit serve`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from longfit.commands.options import (
    Attention,
    Budget,
    ChunkTokens,
    Dtype,
    Json,
    Model,
    Options,
    Total,
    setup_of,
)


def serve(
    model: Model = "smollm2-135m",
    compressor: Annotated[
        str | None, typer.Option("--compressor", "-c", help="A method; see `longfit list`. snapkv without --attention.")
    ] = None,
    attention: Attention = None,
    budget: Budget = None,
    total: Total = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; this machine only by default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", "-p", help="0 for any that is free.")] = 8000,
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder of documents and memories; ~/.local/share/longfit/serve.")
    ] = None,
    memory_limit: Annotated[
        str, typer.Option("--memory-limit", help="For the caches of all documents together; the rest is on disk.")
    ] = "2GiB",
    upload_limit: Annotated[str, typer.Option("--upload-limit", help="The largest upload.")] = "32MiB",
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait; others are told to try again.")] = 32,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    option: Options = None,
    as_json: Json = False,
) -> None:
    """An OpenAI-compatible server and a page: upload documents once, ask many times, see what was kept."""
    from longfit.errors import InputError
    from longfit.units import parse_bytes

    try:
        from longfit.docqa.server import ServerSettings, serve
        from longfit.docqa.server.settings import state_folder
    except ImportError as error:
        raise InputError(f'longfit serve needs {error.name}: pip install "longfit[serve]"') from error

    setup = setup_of(model, dtype, compressor, attention, option, budget, total, chunk_tokens)
    setup.parts()
    settings = ServerSettings(
        model_name=Path(model).name if Path(model).exists() else model,
        state=(state or state_folder()).expanduser(),
        memory_limit=parse_bytes(memory_limit),
        upload_limit=parse_bytes(upload_limit),
        queue=queue,
        host=host,
        port=port,
    )
    loaded, tokenizer = setup.prepare(progress=not as_json)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def started(address: str) -> None:
        print(json.dumps({"address": address, "state": str(settings.state)}), flush=True)

    serve(loaded, tokenizer, settings, tell, started if as_json else None)
