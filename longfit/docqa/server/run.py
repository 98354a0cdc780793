"""Running the server until it is told to stop."""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from longfit.docqa.server.app import create_app
from longfit.docqa.server.settings import ServerSettings
from longfit.errors import InputError
from longfit.units import format_bytes


def serve(
    model: Any,
    tokenizer: Any,
    settings: ServerSettings,
    tell: Callable[[str], None],
    started: Callable[[str], None] | None = None,
) -> None:
    """Answer requests until interrupted.

    Args:
        tell: is told in a line each what a user wants to know: the address, what can reach it.
        started: is told the address.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    listener = _listener(settings)
    host, port = listener.getsockname()[:2]
    app = create_app(model, tokenizer, settings)
    address = f"[{host}]" if ":" in host else host
    tell(f"longfit serves {settings.model_name} at http://{address}:{port}/ (stop with Ctrl-C)")
    if started is not None:
        started(f"http://{address}:{port}/")
    tell(f"documents are kept in {settings.state}; caches take up to {format_bytes(settings.memory_limit)}")
    if not settings.is_loopback:
        tell(
            f"warning: anyone who can reach {host} can read, ask and delete every document: there is no password; put "
            "it behind a proxy that asks for one, or leave --host out"
        )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def _listener(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "give another --port or --host"
        ) from error
    return listener
