"""An OpenAI-compatible server over one wrapped model: documents are compressed once, kept, and asked many times."""

from longfit.docqa.server.app import create_app
from longfit.docqa.server.run import serve
from longfit.docqa.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "serve"]
