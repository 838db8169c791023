"""The HTTP routes, over any backend that segments one image. Nothing of Ray: a test runs them in its own process."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sceneray import __version__
from sceneray.errors import DataError
from sceneray.masks import Photo
from serve.admission import (
    PixelGate,
    Refused,
    UploadLimits,
    check_header,
    check_key,
    decode,
    read_form_upload,
    read_upload,
)
from serve.answers import ANSWERS, choose
from serve.batching import Overloaded
from serve.schemas import Answered, ErrorBody, ModelBody, PredictionBody, SegmentationBody, Segmented

log = logging.getLogger("sceneray.serve")

READY_TIMEOUT_S = 5.0
MAX_REQUEST_ID = 128
BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"schema": {"type": "object", "required": ["image"], "properties": {"image": BINARY["schema"]}}}
RAW = dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), BINARY)
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


class Backend(Protocol):
    """What the routes need of a model."""

    async def segment(self, image: Photo) -> Segmented:
        """The mask of `image` (uint8 [H, W, 3]). Raises Overloaded, or DataError for an image it cannot take."""

    async def describe(self) -> dict[str, Any]:
        """bundle.json and the bundle's `digest`; an answer means that the model is ready."""


@dataclass(frozen=True)
class ApiSettings:
    """What the ingress enforces. `key_digests`: sha256 in hex of the keys that may enter; none: all may."""

    uploads: UploadLimits = field(default_factory=UploadLimits)
    max_pixels_in_work: int = 4 * 4096 * 4096
    key_digests: Sequence[str] = ()


class RequestIds:
    """Names every request in `state.request_id`, and in the header x-request-id of its answer.

    Serve's proxy gives each request an id and echoes it; only without a proxy, and without an id from the caller, is
    it ours to do.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")[:MAX_REQUEST_ID]
        request_id = given or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and not given:
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, named)


def create_app(backend: Backend, settings: ApiSettings) -> FastAPI:
    """The FastAPI app. Built where it runs, so that it is never pickled."""
    app = FastAPI(
        title="sceneray",
        version=__version__,
        description="Scene parsing: a photograph in, the class of every pixel out.",
        docs_url=None,  # the default page loads its scripts from a CDN; ours are served from here
        redoc_url=None,
    )
    gate = PixelGate(settings.max_pixels_in_work)
    guarded = [Depends(_key_check(settings.key_digests))]
    _add_errors(app)
    _add_docs(app)
    _add_health(app, backend)

    async def answer(data: bytes, render: Callable[[Answered], bytes], media_type: str) -> Response:
        height, width = await asyncio.to_thread(check_header, data, settings.uploads)
        with gate.admit(height * width):
            image = await asyncio.to_thread(decode, data)
            segmented = await backend.segment(image)
            body = await asyncio.to_thread(render, Answered(image, segmented.mask, segmented.model))
        return Response(body, media_type=media_type, headers=_headers(segmented))

    @app.post(
        "/v1/segment",
        summary="Segment one image",
        dependencies=guarded,
        response_class=Response,
        responses={200: _forms(), **ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": FORM, **RAW}}},
    )
    async def segment(
        request: Request,
        view: Annotated[
            Literal["mask", "overlay"],
            Query(description="mask: by Accept; overlay: the photograph blended with the mask"),
        ] = "mask",
        accept: Annotated[str | None, Header(description=" | ".join(ANSWERS))] = None,
    ) -> Response:
        """Takes a JPEG, PNG or WebP image as the raw body or the multipart field `image`.

        Answers, by `Accept`: `image/png` (default) the indexed mask in the dataset's colours; `application/json` size
        and the classes present; `image/jpeg`, or `view=overlay`, the blended photograph. The mask lies in the frame in
        which people see the image: EXIF orientation is applied.
        """
        media_type = choose(accept, view)
        response = await answer(await read_upload(request, settings.uploads), ANSWERS[media_type], media_type)
        response.headers["Vary"] = "Accept"
        return response

    @app.post(
        "/predict",
        summary="Class ids as JSON",
        dependencies=guarded,
        response_class=Response,
        responses={200: {"model": PredictionBody}, **ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": FORM}}},
    )
    async def predict(request: Request) -> Response:
        """Every pixel's class id, row by row, and the classes' names. Large: `/v1/segment` is the better choice."""
        return await answer(await read_form_upload(request, settings.uploads), _prediction, "application/json")

    @app.get("/v1/model", summary="The bundle that is served", dependencies=guarded, response_model=ModelBody)
    async def model() -> dict[str, Any]:
        """Classes, colours, name, version, digest, input rule, and the metrics measured before export."""
        about = await backend.describe()
        return {**about, "metrics": about.get("metrics", {})}

    return app


def _prediction(answered: Answered) -> bytes:
    names = [entry.name for entry in answered.model.classes]
    return json.dumps({"prediction": answered.mask.tolist(), "classes": names}, separators=(",", ":")).encode()


def _headers(segmented: Segmented) -> dict[str, str]:
    return {"x-model-version": segmented.model.version, "x-batch-size": str(segmented.batch_size)}


def _forms() -> dict[str, Any]:
    """OpenAPI's content of a 200 of /v1/segment: one entry for each answer format."""
    binary = {kind: BINARY for kind in ANSWERS if kind != "application/json"}
    return {"model": SegmentationBody, "description": "by Accept", "content": binary}


def _key_check(digests: Sequence[str]) -> Callable[..., None]:
    def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        check_key(bearer.credentials if bearer else header, digests)

    return check


def _add_docs(app: FastAPI) -> None:
    assets = str(resources.files("fastapi_offline") / "static")
    app.mount("/docs-assets", StaticFiles(directory=assets), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title="sceneray",
            swagger_js_url=f"{root}/docs-assets/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs-assets/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs-assets/favicon.png",
        )

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope.get('root_path', '').rstrip('/')}/docs")


def _add_health(app: FastAPI, backend: Backend) -> None:
    @app.get("/v2/health/live", summary="The server runs", tags=["health"])
    @app.get("/livez", include_in_schema=False)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="The model answers", tags=["health"], responses={503: {"model": ErrorBody}})
    @app.get("/readyz", include_in_schema=False)
    async def ready() -> dict[str, bool]:
        try:
            await asyncio.wait_for(backend.describe(), READY_TIMEOUT_S)
        except Exception as error:  # whatever keeps the model from answering: not ready
            log.warning("not ready: %s", error)
            raise Refused(503, "not_ready", "the model does not answer yet.", {"Retry-After": "1"}) from error
        return {"ready": True}


def _add_errors(app: FastAPI) -> None:
    """Every error is JSON with the same three keys; what is not the caller's fault is logged, not told."""

    app.add_middleware(RequestIds)

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
        # This answer is made outside RequestIds, so it names itself.
        headers = {} if "x-request-id" in request.headers else {"x-request-id": request.state.request_id}
        return _error(request, 500, "internal_error", text, headers)


def _error(request: Request, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text, "error_type": kind, "request_id": request.state.request_id}, status, headers)
