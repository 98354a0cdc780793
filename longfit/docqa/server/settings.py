"""What a server may use and where it keeps its documents."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from longfit.errors import InputError

MIB = 2**20


def state_folder() -> Path:
    """Where documents are kept by default: $XDG_DATA_HOME/longfit/serve, else ~/.local/share/longfit/serve."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "share") / "longfit" / "serve"


@dataclass(frozen=True)
class ServerSettings:
    """
    Attributes:
        model_name: what `/v1/models` and answers call the model.
        state: the folder that documents and memories are kept in; made if it is not there.
        memory_limit: bytes of all caches at once: memories that wait, the copy that a question works on, and what
            compressing a document takes. Least recently used memories are on disk only.
        upload_limit, body_limit: bytes of a request that brings documents, and of any other.
        queue: requests that may wait for the model; one more is refused with status 429.
        answer_tokens: the longest answer where a request names none.
        host, port: where to listen.
    """

    model_name: str
    state: Path = field(default_factory=state_folder)
    memory_limit: int = 2048 * MIB
    upload_limit: int = 32 * MIB
    body_limit: int = MIB
    queue: int = 32
    answer_tokens: int = 256
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        for name in ("memory_limit", "upload_limit", "body_limit", "queue", "answer_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; it has to be at least 1")
        if not 0 <= self.port < 65536:
            raise InputError(f"port={self.port}; give one from 1 to 65535, or 0 for any that is free")

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
