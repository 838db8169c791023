"""The Open Inference Protocol v2: the model as tensors, for tritonclient, KServe and whoever else speaks it.

`image` UINT8 [N, H, W, 3] in, `mask` UINT8 [N, H, W] out, and `confidence` of the same shape where it is asked for.
/v2/health/live and /v2/health/ready are in health.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from sceneray import __version__
from sceneray.masks import Photo
from serve import oip_answers, oip_messages, oip_schema
from serve.admission import Refused, UploadLimits
from serve.oip_messages import CHANNELS, CONFIDENCE, HEADER, InferRequest
from serve.routes.health import READY_TIMEOUT_S
from serve.routes.segment import model_headers
from serve.schemas import Answered, Ask, ErrorBody, Segmented
from serve.site import Site, Times, timed

log = logging.getLogger("sceneray.serve")

Handler = Callable[[Request, str, str | None], Awaitable[Any]]

# Images of one request that are with the model at once: two full batches, below what a replica lets wait.
AT_ONCE = 16
# Less JSON than this is read at once; more is read in a thread, one request at a time.
SHORT_JSON_BYTES = 64 * 1024


def add(app: FastAPI, site: Site) -> None:
    """`/v2`, and the model's metadata, configuration, readiness and inference, with and without its version."""
    model = _Model(site)
    reading = asyncio.Lock()

    @app.get("/v2", summary="The server and its extensions", tags=["open inference"])
    async def server() -> dict[str, Any]:
        return {
            "name": "sceneray",
            "version": __version__,
            "extensions": ["binary_tensor_data", "model_configuration"],
        }

    @_both(app.get, "", "The model's tensors", dependencies=site.guard)
    async def metadata(_: Request, name: str, version: str | None) -> dict[str, Any]:
        return oip_answers.metadata(await model.about(name, version))

    @_both(app.get, "/config", "The model in the terms of Triton's configuration", dependencies=site.guard)
    async def config(_: Request, name: str, version: str | None) -> dict[str, Any]:
        return oip_answers.config(await model.about(name, version))

    @_both(app.get, "/ready", "The model answers")
    async def ready(_: Request, name: str, version: str | None) -> dict[str, Any]:
        return {"name": await model.ready(name, version), "ready": True}

    @_both(
        app.post,
        "/infer",
        "Segment the images of a tensor",
        dependencies=site.guard,
        response_class=Response,
        **oip_schema.infer(),
    )
    async def infer(request: Request, name: str, version: str | None) -> Response:
        """`image` UINT8 [N, height, width, 3], as JSON numbers or as bytes after the JSON (binary tensor extension).

        Answers `mask` UINT8 [N, height, width] of class ids; `confidence` too, where it is named in `outputs`: the
        probability of the mask's class, 0 to 255.
        """
        await model.known(name, version)
        times = request.state.times
        with timed(times, "read"):
            asked = await _read(request, site.settings.uploads, reading)
        async with site.room(_pixels(asked, site)):
            answers = await _segment_all(site, asked)
            model.check_answers(answers, name, version)
            _note_times(answers, times)
            with timed(times, "encode"):
                body, length = await asyncio.to_thread(oip_answers.encode, asked, answers)
        return _response(body, length, asked, answers)


class _Model:
    """Which model the paths may name: the served one, and it alone."""

    def __init__(self, site: Site) -> None:
        self._backend = site.backend
        self._seen: dict[str, Any] = {}  # the newest description; spares every inference the way to a replica

    async def about(self, name: str, version: str | None) -> dict[str, Any]:
        """The model's description. Raises Refused (404) where the path names another one."""
        self._seen = await self._backend.describe()
        self._check(self._seen["name"], self._seen["version"], name, version)
        return self._seen

    async def known(self, name: str, version: str | None) -> None:
        """As `about`, but from memory where the path fits what was seen last."""
        if self._seen.get("name") != name or version not in (None, self._seen.get("version")):
            await self.about(name, version)

    async def ready(self, name: str, version: str | None) -> str:
        """The model's name, once it answers. Raises Refused: 404 for another one, 503 where it does not answer."""
        try:
            about = await asyncio.wait_for(self.about(name, version), READY_TIMEOUT_S)
        except Refused:
            raise
        except Exception as error:  # whatever keeps the model from answering: not ready
            log.warning("not ready: %s", error)
            raise Refused(503, "not_ready", "the model does not answer yet.", {"Retry-After": "1"}) from error
        return str(about["name"])

    def check_answers(self, answers: list[Segmented], name: str, version: str | None) -> None:
        """Raise Refused where other models answered than the path names: one was put in its place meanwhile."""
        first = answers[0].model
        self._seen = {**self._seen, "name": first.name, "version": first.version}
        if any(answer.model.digest != first.digest for answer in answers):
            text = "the model was replaced while it answered; send the request again."
            raise Refused(503, "model_replaced", text, {"Retry-After": "1"})
        self._check(first.name, first.version, name, version)

    @staticmethod
    def _check(served_name: str, served_version: str, name: str, version: str | None) -> None:
        if name != served_name:
            text = f"there is no model {oip_messages.shown(name)} here: the model is '{served_name}'."
            raise Refused(404, "unknown_model", text)
        if version not in (None, served_version):
            text = f"there is no version {oip_messages.shown(version)} of '{name}' here: '{served_version}' is served."
            raise Refused(404, "unknown_version", text)


def _both(method: Callable[..., Any], path: str, summary: str, **options: Any) -> Callable[[Handler], Handler]:
    """A decorator that adds a handler of (request, name, version) for the paths with and without the version."""
    schema = {"tags": ["open inference"], "responses": {404: {"model": ErrorBody}}} | options

    def add_both(handler: Handler) -> Handler:
        async def newest(request: Request, name: str) -> Any:
            return await handler(request, name, None)

        async def named(request: Request, name: str, version: str) -> Any:
            return await handler(request, name, version)

        said = {"description": handler.__doc__ or "", "name": handler.__name__, **schema}
        method("/v2/models/{name}" + path, summary=summary, **said)(newest)
        method("/v2/models/{name}/versions/{version}" + path, summary=f"{summary}, by version", **said)(named)
        return handler

    return add_both


async def _read(request: Request, limits: UploadLimits, reading: asyncio.Lock) -> InferRequest:
    """The checked request. Raises Refused: 413 above the limits, 415 for a compressed body, 400 for a broken one."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(
            415,
            "unsupported_encoding",
            f"a request's body must not be compressed, got Content-Encoding: {oip_messages.shown(encoding)}.",
            {"Accept-Encoding": "identity"},
        )
    body = await _body(request, limits)
    length = oip_messages.json_length(request.headers.get(HEADER), len(body), limits)
    if length <= SHORT_JSON_BYTES:
        return oip_messages.parse(body, length, limits)
    # One at a time: the parser holds the interpreter's lock, so two would take no less time, only twice the memory.
    async with reading:
        return await asyncio.to_thread(oip_messages.parse, body, length, limits)


async def _body(request: Request, limits: UploadLimits) -> bytes:
    """The body, counted while it comes, whatever the headers claim."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.max_bytes:
        raise _too_large(limits)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limits.max_bytes:
            raise _too_large(limits)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limits: UploadLimits) -> Refused:
    text = f"a request may have {limits.max_bytes} bytes: send fewer or smaller images, or compressed to /v1/segment."
    return Refused(413, "body_too_large", text, detail={"max_bytes": limits.max_bytes})


def _pixels(asked: InferRequest, site: Site) -> int:
    """Pixels of all images. Raises Refused (413) where these, or the answer's numbers, never fit."""
    oip_answers.check_size(asked)
    pixels, most = asked.images.size // CHANNELS, site.settings.max_pixels_in_work
    if pixels > most:
        text = f"a request may have {most} pixels in all, got {pixels}: send several requests."
        raise Refused(413, "too_many_images", text, detail={"max_pixels": most, "pixels": pixels})
    return pixels


async def _segment_all(site: Site, asked: InferRequest) -> list[Segmented]:
    """The answer to each image, in order. Raises what the first to fail raised; the others are then called off."""
    ask = Ask(
        confidence=any(wanted.name == CONFIDENCE for wanted in asked.wanted),
        rule=asked.input,
        deadline=None if asked.timeout_s is None else time.time() + asked.timeout_s,
    )
    places = asyncio.Semaphore(AT_ONCE)

    async def one(image: Photo) -> Segmented:
        async with places:
            return await site.backend.segment(image, ask)

    tasks = [asyncio.ensure_future(one(image)) for image in asked.images]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # nothing is left behind that holds an image


def _note_times(answers: list[Segmented], times: Times) -> None:
    """The longest time of each stage: the images ran beside each other."""
    for answer in answers:
        for stage, seconds in answer.times.items():
            times[stage] = max(times.get(stage, 0.0), seconds)


def _response(body: bytes, length: int | None, asked: InferRequest, answers: list[Segmented]) -> Response:
    """The answer; `length` of its JSON part, None where there is no other. Its headers name the largest batch."""
    image, largest = max(zip(asked.images, answers, strict=True), key=lambda pair: pair[1].batch_size)
    headers = model_headers(Answered(image, largest.mask, largest.model, batch_size=largest.batch_size))
    if length is None:
        return Response(body, media_type="application/json", headers=headers)
    return Response(body, media_type="application/octet-stream", headers={**headers, HEADER: str(length)})
