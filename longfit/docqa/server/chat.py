"""`/v1/chat/completions` and `/v1/models`, as the OpenAI API has them, and `longfit` beside the answer."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, field_validator, model_validator

from longfit.docqa.server.asked import Answered, Asked
from longfit.docqa.server.conversation import Message
from longfit.docqa.server.errors import ApiError, api_error
from longfit.docqa.server.worker import Job

router = APIRouter()
LOOK_EVERY_SECONDS = 0.2


class Part(BaseModel):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def message(self) -> Message:
        """Its role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What else a stream brings."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for an answer; fields that are not here are not looked at, but those of `refused` have to be unset."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    document: str | None = None
    documents: list[str] | None = None
    citations: int = Field(3, ge=0, le=10)
    n: Literal[1] | None = 1
    tools: Literal[None] = None
    functions: Literal[None] = None
    logprobs: Literal[None, False] = None
    logit_bias: Literal[None] = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError("at most 4 stop sequences")
        return stop

    @field_validator("seed")
    @classmethod
    def _small(cls, seed: int | None) -> int | None:
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError("a seed is a whole number of 64 bits")
        return seed

    @model_validator(mode="after")
    def _one_document(self) -> "ChatRequest":
        if len({*(self.documents or []), *([self.document] if self.document else [])}) > 1:
            raise ValueError("one document a question: upload several files together to ask about all of them")
        return self

    def asked(self, default_tokens: int) -> Asked:
        """What the engine is to do."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Asked(
            messages=tuple(turn.message() for turn in self.messages),
            document=self.document or next(iter(self.documents or []), None),
            max_tokens=self.max_completion_tokens or self.max_tokens or default_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            citations=self.citations,
        )


@router.get("/v1/models")
def models(request: Request) -> dict[str, Any]:
    """The one model."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/v1/models/{name:path}")
def model(request: Request, name: str) -> dict[str, Any]:
    """The one model, by its name."""
    _check_model(request, name)
    return _model(request)


@router.post("/v1/chat/completions")
async def complete(request: Request, given: ChatRequest) -> Any:
    """An answer, whole or as a stream of server-sent events."""
    server = request.app.state.server
    _check_model(request, given.model)
    asked = given.asked(server.settings.answer_tokens)
    if asked.document is not None:
        server.library.record(asked.document)
    job = Job(lambda job: server.engine.answer(job, asked))
    events = job.listen()
    server.worker.submit(job)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": given.model}
    try:
        first = await _next(request, events)
    except BaseException:
        job.cancelled.set()
        raise
    if given.stream:
        usage = given.stream_options is not None and given.stream_options.include_usage
        sent = _sent(job, events, first, {**head, "object": "chat.completion.chunk"}, usage)
        return StreamingResponse(sent, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    try:
        while first[0] != "end":
            first = await _next(request, events)
    finally:
        job.cancelled.set()
    answered: Answered = first[1]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answered.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answered.finish_reason,
    }
    rest = {"choices": [choice], "usage": _usage(answered), "longfit": _facts(answered)}
    return {**head, "object": "chat.completion", **rest}


async def _next(request: Request, events: asyncio.Queue[tuple[str, Any]]) -> tuple[str, Any]:
    """The next event of a job whose response has not begun.

    Raises:
        ApiError: what the job failed with; 499, which nobody reads, where the client has gone.
    """
    while True:
        try:
            kind, value = await asyncio.wait_for(events.get(), LOOK_EVERY_SECONDS)
        except TimeoutError:
            if await request.is_disconnected():
                raise ApiError(499, "the client has gone", "client_gone") from None
            continue
        if kind == "error":
            raise api_error(value)
        return kind, value


async def _sent(
    job: Job, events: asyncio.Queue[tuple[str, Any]], event: tuple[str, Any], head: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    """The events of a job as chunks. When the client goes, this is closed, and the job cancelled with it."""

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _line({**head, "choices": [choice], **({"usage": None} if usage else {}), **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while True:
            kind, value = event
            if kind == "text":
                yield chunk({"content": value})
            elif kind == "citing":
                yield ": looking for passages\n\n"
            elif kind == "error":
                yield _line(api_error(value).body)
                return
            else:
                yield chunk({}, value.finish_reason, longfit=_facts(value))
                if usage:
                    yield _line({**head, "choices": [], "usage": _usage(value)})
                yield "data: [DONE]\n\n"
                return
            event = await events.get()
    finally:
        job.cancelled.set()


def _line(given: dict[str, Any]) -> str:
    return f"data: {json.dumps(given)}\n\n"


def _usage(answered: Answered) -> dict[str, Any]:
    return {
        "prompt_tokens": answered.prompt_tokens,
        "completion_tokens": answered.completion_tokens,
        "total_tokens": answered.prompt_tokens + answered.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answered.cached_tokens},
    }


def _facts(answered: Answered) -> dict[str, Any]:
    return {
        "citations": [citation.to_dict() for citation in answered.citations],
        "kept_tokens": answered.kept_tokens,
        "kv_bytes": answered.kv_bytes,
        "seconds": answered.seconds,
    }


def _model(request: Request) -> dict[str, Any]:
    server = request.app.state.server
    name = server.settings.model_name
    facts = {**server.engine.about, "upload_limit": server.settings.upload_limit}
    return {"id": name, "object": "model", "created": server.started_at, "owned_by": "longfit", "longfit": facts}


def _check_model(request: Request, name: str) -> None:
    known = request.app.state.server.settings.model_name
    if name != known:
        raise ApiError(404, f"there is no model {name!r}; this server has {known!r}", "model_not_found", "model")
