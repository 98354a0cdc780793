"""The app: its parts put together, and what happens when it starts and stops."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import longfit
from longfit.docqa.server import chat, documents, page_files
from longfit.docqa.server.engine import Engine
from longfit.docqa.server.errors import install
from longfit.docqa.server.guard import Guard
from longfit.docqa.server.library import Library
from longfit.docqa.server.record import READY, Record
from longfit.docqa.server.settings import ServerSettings
from longfit.docqa.server.worker import Job, Worker
from longfit.errors import InputError, UnsupportedFeatureError


class Server:
    """What the routes work with: one model, its documents, the thread that it runs in.

    Raises:
        InputError: the model is not wrapped; the state folder cannot be used.
        UnsupportedFeatureError: its compressor needs the question, so nothing can be compressed once for many.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ServerSettings) -> None:
        if not hasattr(model, "longfit"):
            raise InputError("wrap the model first: longfit.wrap(model, ...)")
        for step in (model.longfit.prompt, model.longfit.encoder):
            if step is not None and step.query_aware:
                raise UnsupportedFeatureError(
                    f"{step.name} compresses a document for one question, and a server keeps it for many; take another "
                    "compressor, see `longfit list`"
                )
        self.settings, self.started_at = settings, int(time.time())
        context = model.longfit
        made_by = {"budget": str(context.budget), "geometry": str(context.geometry), "chunk": str(context.chunk_tokens)}
        self.library = Library(settings, {**model._fingerprint(), **made_by})
        self.engine = Engine(model, tokenizer, self.library)
        self.worker = Worker(settings.queue)
        self.reading = asyncio.Semaphore(1)
        for record in self.library.records:
            if record.status != READY:
                self.worker.submit(self.reading_of(record), always=True)

    def reading_of(self, record: Record) -> Job:
        """The work of compressing a document."""
        return Job(lambda job: self.engine.read(job, record))

    def close(self) -> None:
        """Stop the worker and leave the state folder to others."""
        self.worker.stop()
        self.library.close()


def create_app(model: Any, tokenizer: Any, settings: ServerSettings) -> FastAPI:
    """The server as an ASGI app; `serve` runs it.

    Args:
        model: a model from `longfit.wrap`, which then belongs to the server.
        tokenizer: its tokenizer.
    """
    server = Server(model, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    # Its documentation pages load scripts from elsewhere, so there are none.
    app = FastAPI(title="longfit", version=longfit.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, settings=settings)
    install(app)
    for router in (chat.router, documents.router, page_files.router):
        app.include_router(router)
    return app
