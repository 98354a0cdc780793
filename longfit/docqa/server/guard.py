"""What every request passes before the app sees it: who may ask, and how much they may send."""

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longfit.docqa.server.errors import ApiError
from longfit.docqa.server.settings import ServerSettings
from longfit.units import format_bytes

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests from other sites and requests that are too large, and sets the headers of a closed server.

    A page of another site can reach a server on this machine through its visitor's browser. It is told by its `Origin`,
    or, where it gave its own name this machine's address (DNS rebinding), by the `Host` that it asked for.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        uploads = scope["path"] == "/v1/documents"
        limit = self.settings.upload_limit if uploads else self.settings.body_limit
        refused = self._foreign(headers) or self._too_large(headers, limit)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise too_large(limit)
            return message

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await self.app(scope, counted, closed)

    def _foreign(self, headers: dict[str, str]) -> ApiError | None:
        host = headers.get("host", "")
        if self.settings.is_loopback and _name(f"//{host}") not in LOOPBACK:
            return ApiError(403, f"this server answers to localhost only, not to {host!r}", "foreign_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return ApiError(403, f"requests from pages of {origin!r} are not answered", "foreign_origin")
        return None

    def _too_large(self, headers: dict[str, str], limit: int) -> ApiError | None:
        length = headers.get("content-length", "0")
        return too_large(limit) if not length.isdigit() or int(length) > limit else None


def too_large(limit: int) -> ApiError:
    """The refusal of a request of more than `limit` bytes."""
    return ApiError(413, f"the request is larger than {format_bytes(limit)}, which is this server's limit", "too_large")


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
