"""Who and what may come in, decided as early and as cheaply as possible.

In this order: the key, the body's size while it is read, the header of the image (format, dimensions, one frame), the
pixels in flight, and only then decoding. Nothing is ever fetched for a caller: an image arrives in the request.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from sceneray.data.images import decode_image
from sceneray.errors import DataError, ServingError
from sceneray.masks import Photo
from serve.batching import Overloaded

# Pillow knows many formats; each is code that an upload could attack.
FORMATS = ("JPEG", "PNG", "WEBP")
FIELD = "image"


class Refused(ServingError):
    """A request that is answered with a 4xx: `status`, a word for programs, and the rule, what came and the fix."""

    def __init__(self, status: int, error_type: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class UploadLimits:
    """What one upload may be."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 4096 * 4096
    max_side: int = 8192


def check_key(presented: str | None, digests: Sequence[str]) -> None:
    """Raise Refused (401) unless `presented` is a key with one of the sha256 `digests`; no digests: all may enter."""
    if not digests:
        return
    digest = hashlib.sha256((presented or "").encode()).hexdigest()
    # Every digest is compared, each in constant time: the time taken says nothing about the keys.
    matches = [hmac.compare_digest(digest, known) for known in digests]
    if not any(matches):
        what = "no key came" if not presented else "this key is not known"
        raise Refused(
            401,
            "unauthorized",
            f"an API key is required and {what}: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
            {"WWW-Authenticate": "Bearer"},
        )


async def read_upload(request: Request, limits: UploadLimits) -> bytes:
    """The image's bytes: the multipart field `image`, or the raw body.

    Raises Refused: 413 above `max_bytes` (counted while reading, whatever the headers claim), 415 for another content
    type, 422 for an empty body or a form without the field.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise _too_large(limits)
    bounded = Request(request.scope, _counted(request.receive, limits))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        data = await _form_file(bounded)
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        data = await bounded.body()
    else:
        raise Refused(
            415,
            "unsupported_media_type",
            f"the body must be an image or multipart/form-data, got {kind}: send -F image=@photo.jpg, or "
            "--data-binary @photo.jpg with -H 'Content-Type: image/jpeg'.",
        )
    if not data:
        raise Refused(422, "empty_image", "an image is required and the body is empty.")
    return data


async def read_form_upload(request: Request, limits: UploadLimits) -> bytes:
    """As `read_upload`, but multipart alone."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(
            415,
            "unsupported_media_type",
            "the body must be multipart/form-data with a file field 'image': -F image=@FILE.",
        )
    return await read_upload(request, limits)


def check_header(data: bytes, limits: UploadLimits) -> tuple[int, int]:
    """(height, width) as stored, read from the image's header; nothing is decoded.

    Raises Refused: 415 for a file that is no JPEG, PNG or WebP, 413 above the limits, 422 for a damaged header or an
    animation.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
            _check_size(width, height, limits)
            # A phone's JPEG (MPO) holds the photograph and then previews or depth; PNG and WebP frames are a film.
            frames = 1 if header.format in ("JPEG", "MPO") else getattr(header, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise Refused(
            415, "unsupported_image", "the file is no JPEG, PNG or WebP image, or its header is damaged."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits, "more than Pillow opens") from error
    except Refused:
        raise
    except Exception as error:  # a parser meets hostile bytes: whatever it raises is the file's fault
        raise Refused(422, "broken_image", f"the image's header cannot be read: {error}.") from error
    if frames != 1:
        raise Refused(
            422, "animated_image", f"one frame is expected, got an animation of {frames}: send a single picture."
        )
    return height, width


def decode(data: bytes) -> Photo:
    """uint8 [H, W, 3] RGB, turned as its EXIF orientation says: the frame in which people see it.

    Alpha is dropped; grey (8 and 16 bits), palette and CMYK are converted, as `prepare` does. Raises Refused (422)
    where the data is damaged. Slow: call it off the event loop.
    """
    try:
        return decode_image(data)
    except DataError as error:
        raise Refused(422, "broken_image", f"the image cannot be decoded: {error}") from error
    except Exception as error:  # as above
        raise Refused(422, "broken_image", f"the image cannot be decoded: {type(error).__name__}: {error}") from error


class PixelGate:
    """Bounds the pixels that are decoded and not yet answered, and so the memory. Belongs to one event loop."""

    def __init__(self, max_pixels: int) -> None:
        self._max = max_pixels
        self._inside = 0

    @contextlib.contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        """Hold room for `pixels`; raises Overloaded where there is none now."""
        if self._inside + pixels > self._max:
            raise Overloaded("the endpoint has as many images in work as it may hold; try again in 1 s.")
        self._inside += pixels
        try:
            yield
        finally:
            self._inside -= pixels


async def _form_file(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=16, max_part_size=64 * 1024) as form:
        part = form.get(FIELD)
        if not isinstance(part, UploadFile):
            fields = ", ".join(sorted(form)) or "none"
            raise Refused(
                422,
                "missing_field",
                f"a file field '{FIELD}' is required, got fields: {fields}. Send -F {FIELD}=@photo.jpg.",
            )
        return await part.read()


def _counted(receive: Receive, limits: UploadLimits) -> Receive:
    """`receive` that refuses once more than `max_bytes` of body came through."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limits.max_bytes:
            raise _too_large(limits)
        return message

    return counted


def _check_size(width: int, height: int, limits: UploadLimits) -> None:
    if width < 1 or height < 1:
        raise Refused(422, "broken_image", f"the image's header says {width} × {height} pixels.")
    if width > limits.max_side or height > limits.max_side or width * height > limits.max_pixels:
        raise _too_many_pixels(limits, f"{width} × {height}")


def _too_large(limits: UploadLimits) -> Refused:
    return Refused(
        413,
        "body_too_large",
        f"a request may have {limits.max_bytes} bytes: send a smaller or stronger compressed image.",
    )


def _too_many_pixels(limits: UploadLimits, what: str) -> Refused:
    return Refused(
        413,
        "image_too_large",
        f"an image may have {limits.max_pixels} pixels and {limits.max_side} a side, got {what}: send it scaled down.",
    )
