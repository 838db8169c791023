"""Errors as answers: JSON with the same keys everywhere."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sceneray.errors import DataError
from serve.admission import Refused
from serve.batching import Overloaded
from serve.schemas import ErrorBody

log = logging.getLogger("sceneray.serve")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        401: "a key is required",
        406: "no acceptable form of answer",
        413: "too many bytes or pixels",
        415: "not an image this server reads",
        422: "damaged, empty, animated or too small; or a wrong parameter",
        429: "overloaded: try again after Retry-After seconds",
    }.items()
}


def add(app: FastAPI) -> None:
    """Every error is JSON with the same keys; what is not the caller's fault is logged, not told."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(request, error.status, error.error_type, str(error), error.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        return _error(request, 429, "overloaded", str(error), {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(DataError)
    async def unfit(request: Request, error: DataError) -> Response:
        return _error(request, 422, "unfit_image", str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        text = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        return _error(request, 422, "invalid_parameter", text)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return _error(request, error.status_code, kind, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> Response:
        return _error(request, 400, "disconnected", "the client went away while sending.")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        log.error("request %s failed", request.state.request_id, exc_info=error)
        text = "the server failed; its log has the reason under this request_id."
        # This answer is made outside RequestContext, so it names itself.
        headers = {} if "x-request-id" in request.headers else {"x-request-id": request.state.request_id}
        return _error(request, 500, "internal_error", text, headers)


def _error(request: Request, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text, "error_type": kind, "request_id": request.state.request_id}, status, headers)
