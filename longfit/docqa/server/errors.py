"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import errno
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from safetensors import SafetensorError
from starlette.exceptions import HTTPException

from longfit.errors import LongfitError

logger = logging.getLogger("longfit.serve")

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class ApiError(HTTPException):
    """An answer that is an error.

    Attributes:
        status_code: of HTTP.
        detail: what is wrong and what would do.
        code: for programs.
        param: the field of the request that is meant.
        retry_after: seconds after which to try again; None where that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.code, self.param, self.retry_after = code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status_code == 429 else kind
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body, self.status_code, headers)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; what only a defect can cause is told to the log alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if is_full_disk(error):
        return ApiError(
            507, "the server's disk is full: delete documents, or make room in its state folder", "disk_full"
        )
    if isinstance(error, LongfitError):
        return ApiError(400, " ".join(str(error).split()), type(error).__name__)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says how", "internal_error")


def is_full_disk(error: BaseException) -> bool:
    """Something could not be written because there is no room."""
    if isinstance(error, SafetensorError):
        return "os error 28" in str(error) or "No space left" in str(error)
    return isinstance(error, OSError) and error.errno in NO_SPACE


def install(app: FastAPI) -> None:
    """Let every error of the app leave it in this form."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{where}: {message}" if where else message, "invalid_value", where).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, known)
    app.add_exception_handler(LongfitError, known)
    app.add_exception_handler(OSError, known)
    app.add_exception_handler(Exception, known)
