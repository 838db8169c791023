"""What crosses between `sceneray.client` and an endpoint: images as files, and answers as results or errors."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np
from PIL import Image, ImageOps

from sceneray.data.images import decode_label
from sceneray.errors import DataError, ScenerayError, ServingError
from sceneray.masks import PNG_LEVEL, Mask, Photo

# A file's name on this machine, a file's bytes (JPEG, PNG, WebP), or a picture: uint8 [H, W, 3] RGB or [H, W] grey.
Picture: TypeAlias = str | Path | bytes | Image.Image | Photo

THE_IMAGES_FAULT = (413, 415, 422)


@dataclass(frozen=True)
class Model:
    """Which model answered; `digest` names its whole content."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Result:
    """The answer to one image.

    `mask`: uint8 [H, W] of class ids in the frame in which people see the image; 255 is of no class, or of none that
    was asked for. `classes`: those present, {id, name, color, share}, the largest share of all pixels first.
    `request_id` names the request in the endpoint's log. `times`: seconds by stage as the endpoint tells them, and
    "call", how long the caller waited. `confidence`: uint8 [H, W], the probability of the mask's class, 0 to 255, where
    it was asked for.
    """

    mask: Mask
    classes: list[dict[str, Any]]
    model: Model
    request_id: str
    times: dict[str, float]
    confidence: Mask | None = None


def encoded(image: Picture) -> bytes:
    """The bytes of an image file: as they are, or a PNG of the picture, which loses nothing."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"the image {image} cannot be read: {error.strerror or error}.") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.size == 0 or not (image.ndim == 2 or image.shape[2:] == (3,)):
            raise DataError(
                f"an image must be a uint8 array [H, W, 3] (RGB) or [H, W], got {image.dtype} {list(image.shape)}."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a path, bytes, a PIL image or a uint8 array, got {type(image).__name__}.")
    upright = ImageOps.exif_transpose(image)
    # PNG knows most modes and the endpoint reads them as a viewer does; the others are those of print and science.
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def result(answer: httpx.Response) -> Result:
    """The result that an answer of /v1/segment holds. Raises ServingError where it holds none."""
    body = json_of(answer)
    try:
        sure = body.get("confidence")
        return Result(
            mask=_picture(body["mask"]),
            classes=[{key: row[key] for key in ("id", "name", "color", "share")} for row in body["classes"]],
            model=Model(body["model"]["name"], body["model"]["version"], answer.headers.get("x-model-digest", "")),
            request_id=answer.headers.get("x-request-id", ""),
            times=_stages(answer.headers.get("server-timing", "")),
            confidence=None if sure is None else _picture(sure),
        )
    except (AttributeError, KeyError, TypeError, ValueError, DataError) as error:
        raise ServingError(
            f"{plain(answer.request.url)} answered with something else than a mask: is it an endpoint of sceneray, of "
            "this version?"
        ) from error


def _picture(text: str) -> Mask:
    """uint8 [H, W] of a PNG in base64."""
    try:
        mask: Mask = decode_label(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise DataError(f"no base64: {error}") from error
    return mask


def _stages(header: str) -> dict[str, float]:
    """Seconds by stage of a header Server-Timing (`decode;dur=3.1, model;dur=20.5`, milliseconds)."""
    times: dict[str, float] = {}
    for entry in header.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            with contextlib.suppress(ValueError):
                if parameter.startswith("dur="):
                    times[name] = float(parameter.removeprefix("dur=")) / 1000
    return times


def refusal(answer: httpx.Response) -> ScenerayError:
    """The error for an answer that is none: the endpoint's own sentence, with the request's id where there is one."""
    said = json_of(answer)
    sentence = said.get("error") if isinstance(said, dict) else None
    request_id = answer.headers.get("x-request-id", "")
    named = f" (request {request_id})" if request_id else ""
    told = sentence or answer.text[:200] or "nothing more was said."
    text = f"{plain(answer.request.url)} answered {answer.status_code}: {told}{named}"
    return DataError(text) if answer.status_code in THE_IMAGES_FAULT else ServingError(text)


def is_passing(answer: httpx.Response) -> bool:
    """Whether another try may do better: busy, away for a moment, or a proxy that lost the replica behind it.

    Ray Serve's proxy answers 500 and others 502 where the endpoint's process died over a request; the endpoint's own
    500 has an `error_type` and would only come again.
    """
    said = json_of(answer)
    own = isinstance(said, dict) and "error_type" in said
    return answer.status_code in (429, 503) or (answer.status_code in (500, 502) and not own)


def json_of(answer: httpx.Response) -> Any:
    """The body of an answer as JSON; None where it is none."""
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError):
        return None


def plain(url: httpx.URL) -> str:
    """`url` without its query and without a password in it."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"
