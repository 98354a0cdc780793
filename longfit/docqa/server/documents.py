"""`/v1/documents`: upload, list, look at, delete; and what was kept of one."""

import re
import unicodedata
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile as Upload

from longfit.docqa.document import Document
from longfit.docqa.reading import document_of
from longfit.docqa.server.errors import ApiError
from longfit.docqa.server.record import FAILED, READY, Record

router = APIRouter()
MOST_FILES = 20
NAME_CHARACTERS = 120


@router.post("/v1/documents", status_code=202)
async def upload(request: Request) -> dict[str, Any]:
    """Take one or more files (form field `file`) as one document; it is compressed when its turn comes."""
    server = request.app.state.server
    async with request.form(max_files=MOST_FILES, max_fields=8) as form:
        files = [value for value in form.getlist("file") if isinstance(value, Upload)]
        if not files:
            raise ApiError(400, "send one or more files in the form field 'file'", "no_file", "file")
        data = [(await file.read(), shown_name(file.filename)) for file in files]
    async with server.reading:  # one at a time: a hostile file must not take every thread
        documents = [await run_in_threadpool(document_of, content, name) for content, name in data]
    size = sum(len(content) for content, _ in data)
    return await run_in_threadpool(take_in, server, documents, size)


def take_in(server: Any, documents: list[Document], size: int) -> dict[str, Any]:
    """Store documents and queue them for the model.

    Raises:
        ApiError: 429, too many wait already; nothing is stored then.
    """
    record = server.library.add(documents, size)
    try:
        server.worker.submit(server.reading_of(record))
    except ApiError:
        server.library.remove(record.id)
        raise
    return shown(server, record)


@router.get("/v1/documents")
def listed(request: Request) -> dict[str, Any]:
    """All documents, the newest first, and the memory that they share."""
    server = request.app.state.server
    library = server.library
    return {
        "object": "list",
        "data": [shown(server, record) for record in reversed(library.records)],
        "memory_bytes": library.bytes,
        "memory_limit": library.limit,
        "waiting": server.worker.waiting,
    }


@router.get("/v1/documents/{id}")
def looked_at(request: Request, id: str) -> dict[str, Any]:
    """One document."""
    server = request.app.state.server
    return shown(server, server.library.record(id))


@router.get("/v1/documents/{id}/kept")
def kept(request: Request, id: str) -> Response:
    """Its text and what was kept of it; see `longfit.docqa.kept_picture`."""
    library = request.app.state.server.library
    record: Record = library.record(id)
    file = record.picture_file(library.fingerprint)
    if record.status != READY or not file.is_file():
        why = "could not be compressed" if record.status == FAILED else f"is {record.status}"
        why = "has no picture: the tokenizer does not say where tokens begin" if record.status == READY else why
        raise ApiError(404, f"this document {why}", "no_picture")
    return FileResponse(file, media_type="application/json", headers={"Cache-Control": "private, max-age=3600"})


@router.delete("/v1/documents/{id}")
def deleted(request: Request, id: str) -> dict[str, Any]:
    """Remove a document, its text and its memory."""
    request.app.state.server.library.remove(id)
    return {"id": id, "object": "document", "deleted": True}


def shown(server: Any, record: Record) -> dict[str, Any]:
    """A document as clients see it."""
    return record.to_dict(server.library.in_memory(record.id))


def shown_name(given: str | None) -> str:
    """What to call an uploaded file: the last part of its name, without what cannot be printed."""
    last = re.split(r"[\\/]", given or "")[-1]
    plain = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip()
    if len(plain) > NAME_CHARACTERS:
        stem, dot, ending = plain.rpartition(".")
        ending = f"{dot}{ending}" if stem and len(ending) < 10 else ""
        plain = plain[: NAME_CHARACTERS - len(ending)] + ending
    return plain or "document"
