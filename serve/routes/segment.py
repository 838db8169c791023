"""A photograph in, the class of every pixel out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request, Response

from serve.admission import read_form_upload, read_upload
from serve.answers import ANSWERS, choose
from serve.routes.errors import ERRORS
from serve.schemas import Answered, Ask, PredictionBody, SegmentationBody
from serve.site import Site, timed

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"schema": {"type": "object", "required": ["image"], "properties": {"image": BINARY["schema"]}}}
RAW = dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), BINARY)


def add(app: FastAPI, site: Site) -> None:
    """`/v1/segment`, and `/predict` for callers who want plain JSON."""
    uploads = site.settings.uploads

    async def answer(
        request: Request, data: bytes, ask: Ask, render: Callable[[Answered], bytes], media_type: str
    ) -> Response:
        times = request.state.times
        async with site.segmented(data, ask, times) as answered:
            with timed(times, "encode"):
                body = await asyncio.to_thread(render, answered)
        return Response(body, media_type=media_type, headers=model_headers(answered))

    @app.post(
        "/v1/segment",
        summary="Segment one image",
        dependencies=site.guard,
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
        data = await read_upload(request, uploads)
        response = await answer(request, data, Ask(), ANSWERS[media_type], media_type)
        response.headers["Vary"] = "Accept"
        return response

    @app.post(
        "/predict",
        summary="Class ids as JSON",
        dependencies=site.guard,
        response_class=Response,
        responses={200: {"model": PredictionBody}, **ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": FORM}}},
    )
    async def predict(request: Request) -> Response:
        """Every pixel's class id, row by row, and the classes' names. Large: `/v1/segment` is the better choice."""
        data = await read_form_upload(request, uploads)
        return await answer(request, data, Ask(), _prediction, "application/json")


def model_headers(answered: Answered) -> dict[str, str]:
    """Which model answered, and with how many other images in its forward pass."""
    return {
        "x-model-name": answered.model.name,
        "x-model-version": answered.model.version,
        "x-model-digest": answered.model.digest,
        "x-batch-size": str(answered.batch_size),
    }


def _prediction(answered: Answered) -> bytes:
    names = [entry.name for entry in answered.model.classes]
    return json.dumps({"prediction": answered.mask.tolist(), "classes": names}, separators=(",", ":")).encode()


def _forms() -> dict[str, Any]:
    """OpenAPI's content of a 200 of /v1/segment: one entry for each answer format."""
    binary = {kind: BINARY for kind in ANSWERS if kind != "application/json"}
    return {"model": SegmentationBody, "description": "by Accept", "content": binary}
