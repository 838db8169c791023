"""A photograph in, the class of every pixel out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request, Response

from serve.admission import read_form_upload
from serve.answer_choice import Choice, SegmentQuery, choose
from serve.answer_examples import json_examples
from serve.answer_several import Outcome, Rendered, all_of, json_array, zipped
from serve.answers import FORMATS, select, shape_headers
from serve.routes.errors import ERRORS
from serve.schemas import Answered, Ask, ImageBody, PredictionBody, SegmentationBody, SegmentBody
from serve.site import Site, Times, timed
from serve.uploads import MAX_IMAGES, Upload, check_together, read_uploads

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"schema": {"type": "object", "required": ["image"], "properties": {"image": BINARY["schema"]}}}
SEVERAL = {"type": "array", "items": BINARY["schema"], "minItems": 1, "maxItems": MAX_IMAGES}
FORMS = {"schema": {"type": "object", "required": ["image"], "properties": {"image": SEVERAL}}}
RAW = dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), BINARY)
ZIP = "application/zip"
JSON = "application/json"


def add(app: FastAPI, site: Site) -> None:
    """`/v1/segment`, and `/predict` for callers who want plain JSON."""

    @app.post(
        "/v1/segment",
        summary="Segment one image, or some",
        dependencies=site.guard,
        response_class=Response,
        responses={200: _answers(), **ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": FORMS, **RAW}}},
    )
    async def segment(
        request: Request,
        query: Annotated[SegmentQuery, Query()],
        accept: Annotated[str | None, Header(description=_accept_text(), examples=["image/webp"])] = None,
    ) -> Response:
        """Takes a JPEG, PNG or WebP image as the raw body or the multipart field `image`.

        Answers in the form that `format` names, else in the one that `Accept` likes best, else with the indexed mask.
        The mask lies in the frame in which people see the image: EXIF orientation is applied.

        The field `image` may come several times. The images then have one answer each, in a JSON array where the
        format is JSON and in a zip otherwise; an image that is refused has its error in its place.
        """
        choice = choose(query, accept)
        uploads = await read_uploads(request, site.settings.uploads)
        if len(uploads) > 1:
            await asyncio.to_thread(check_together, uploads, site.settings.uploads)
            response = await _several(site, request, uploads, choice)
        else:
            answer = await _rendered(site, request.state.times, uploads[0].data, choice)
            response = Response(answer.body, media_type=choice.wish.media_type, headers=answer.headers)
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
        data = await read_form_upload(request, site.settings.uploads)
        async with site.segmented(data, Ask(), request.state.times) as answered:
            with timed(request.state.times, "encode"):
                body = await asyncio.to_thread(_prediction, answered)
        return Response(body, media_type=JSON, headers=model_headers(answered))


async def _rendered(site: Site, times: Times, data: bytes, choice: Choice) -> Rendered:
    """The answer to one image file."""
    async with site.segmented(data, choice.ask, times) as answered:
        with timed(times, "encode"):
            body = await asyncio.to_thread(_render, answered, choice)
    size = (int(answered.mask.shape[0]), int(answered.mask.shape[1]))
    return Rendered(body, size, {**model_headers(answered), **shape_headers(answered)})


def _render(answered: Answered, choice: Choice) -> bytes:
    return choice.format.render(select(answered, choice.classes), choice.wish)


async def _several(site: Site, request: Request, uploads: Sequence[Upload], choice: Choice) -> Response:
    """The answers to several image files; its headers name the model that answered the first."""

    async def one(upload: Upload) -> Rendered:
        return await _rendered(site, request.state.times, upload.data, choice)

    outcomes: list[Outcome] = await all_of(uploads, one)
    answered = [outcome for outcome in outcomes if isinstance(outcome, Rendered)]
    headers = (
        {name: value for name, value in answered[0].headers.items() if name.startswith("x-model-")} if answered else {}
    )
    request_id = request.state.request_id
    media_type = choice.wish.media_type
    if media_type == JSON:
        return Response(json_array(uploads, outcomes, request_id), media_type=JSON, headers=headers)
    body = await asyncio.to_thread(zipped, uploads, outcomes, request_id, media_type)
    return Response(body, media_type=ZIP, headers=headers)


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


def _accept_text() -> str:
    kinds = [kind for form in FORMATS.values() if form.by_accept for kind in form.media_types]
    return "where the query names no format: " + ", ".join(kinds)


def _answers() -> dict[str, Any]:
    """OpenAPI's content of a 200 of /v1/segment: every media type, and an example of every JSON."""
    kinds = [kind for form in FORMATS.values() for kind in form.media_types if kind != JSON]
    described = "; ".join(
        f"{name} ({', '.join(form.media_types)}): {form.description}" for name, form in FORMATS.items()
    )
    return {
        "model": SegmentationBody | list[SegmentBody] | list[ImageBody],
        "description": f"{described}. Several images: an array of ImageBody, or a zip with it as manifest.json",
        "content": {JSON: {"examples": json_examples()}, **dict.fromkeys((*kinds, ZIP), BINARY)},
    }
