"""Errors as answers: JSON with the same keys everywhere."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sceneray.errors import DataError, ServingError
from serve.admission import Refused
from serve.batching import OutOfMemory, Overloaded, TooLate
from serve.schemas import ErrorBody
from serve.visit import Visit

log = logging.getLogger("sceneray.serve")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request breaks HTTP or multipart",
        401: "a key is required",
        406: "no acceptable form of answer",
        413: "too many bytes or pixels",
        415: "not an image this server reads",
        422: "damaged, empty or too small; or a wrong parameter",
        429: "overloaded, or the key's quota is used up: try again after Retry-After seconds",
        503: "the model does not answer now: try again after Retry-After seconds",
        504: "not ready within the deadline",
    }.items()
}
# What Starlette and FastAPI raise by themselves.
KINDS = {404: "not_found", 405: "method_not_allowed"}


def add(app: FastAPI) -> None:
    """Every error is JSON with the same keys; what is not the caller's fault is logged, not told (middleware.py)."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(request.state.visit, error)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        seconds = max(1, math.ceil(error.retry_after_s))
        told = Refused(429, "overloaded", str(error), {"Retry-After": str(seconds)}, {"retry_after_s": seconds})
        return answer(request.state.visit, told)

    @app.exception_handler(TooLate)
    async def too_late(request: Request, error: TooLate) -> Response:
        return answer(request.state.visit, Refused(504, "deadline_exceeded", str(error)))

    @app.exception_handler(OutOfMemory)
    async def too_large(request: Request, error: OutOfMemory) -> Response:
        # Trying again would not help.
        return answer(request.state.visit, Refused(413, "out_of_memory", str(error)))

    @app.exception_handler(ServingError)
    async def unavailable(request: Request, error: ServingError) -> Response:
        # A model that says itself why it cannot answer now.
        log.warning("request %s: the model cannot answer: %s", request.state.request_id, error)
        return answer(request.state.visit, Refused(503, "unavailable", str(error), {"Retry-After": "1"}))

    @app.exception_handler(DataError)
    async def unfit(request: Request, error: DataError) -> Response:
        return answer(request.state.visit, Refused(422, "unfit_image", str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Where and why; never the value, which is the caller's own.
        wrong = [{"where": ".".join(map(str, e["loc"])), "why": e["msg"]} for e in error.errors()]
        text = "; ".join(f"{one['where']}: {one['why']}" for one in wrong)
        return answer(request.state.visit, Refused(422, "invalid_parameter", text, detail={"parameters": wrong}))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = KINDS.get(error.status_code, "bad_request")
        return answer(request.state.visit, Refused(error.status_code, kind, str(error.detail), error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> Response:
        return answer(request.state.visit, Refused(400, "disconnected", "the client went away while sending."))


def broken() -> Refused:
    """The 500 that tells nothing of what is inside."""
    return Refused(500, "internal_error", "the server failed; its log has the reason under this request_id.")


def answer(visit: Visit, error: Refused) -> Response:
    """`error` as the answer to the request of `visit` (schemas.ErrorBody)."""
    visit.error_type = error.error_type
    body = {
        "error": str(error),
        "error_type": error.error_type,
        "detail": error.detail,
        "request_id": visit.request_id,
    }
    return JSONResponse(body, error.status, error.headers)
