"""Who and what may come in, decided as early and as cheaply as possible.

In this order: the key (serve/guard.py, before any of the body is read), the body's size while it is read, the format by
its magic bytes, the dimensions in the image's header, the pixels in flight, and only then decoding. Nothing is ever
fetched for a caller: an image arrives in the request.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from sceneray.data.images import decode_image
from sceneray.errors import DataError, ServingError
from sceneray.masks import Photo
from serve.batching import Overloaded
from serve.image_header import FORMATS, MAX_JPEG_SCANS, jpeg_scans, sniff, webp_size

FIELD = "image"
# A refused caller is never told to stay away for longer: the estimate behind it is of this minute.
MAX_RETRY_AFTER_S = 60
# The gate's memory of how fast pixels leave: what was this long ago counts a third.
SPEED_MEMORY_S = 10.0


class Refused(ServingError):
    """A request that is answered with an error: `status`, a word for programs, and the rule, what came and the fix.

    `detail`: the facts for programs (limits, what came), as plain JSON values.
    """

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        # All of them, or the exception would not survive the way from a replica.
        super().__init__(status, error_type, message, headers, detail)
        self.status = status
        self.error_type = error_type
        self.headers = dict(headers or {})
        self.detail = None if detail is None else dict(detail)

    def __str__(self) -> str:
        return str(self.args[2])


@dataclass(frozen=True)
class UploadLimits:
    """What one upload may be."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 4096 * 4096
    max_side: int = 8192


async def read_upload(request: Request, limits: UploadLimits) -> bytes:
    """The image's bytes: the multipart field `image`, or the raw body.

    Raises Refused: 413 above `max_bytes` (counted while reading, whatever the headers claim), 415 for another content
    type, 422 for an empty body or a form without the field.
    """
    body = bounded(request, limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        data = await _form_file(body)
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        data = await body.body()
    else:
        raise Refused(
            415,
            "unsupported_media_type",
            f"the body must be an image or multipart/form-data, got {kind}: send -F image=@photo.jpg, or "
            "--data-binary @photo.jpg with -H 'Content-Type: image/jpeg'.",
        )
    check_not_empty(data)
    return data


def check_not_empty(data: bytes) -> None:
    """Raise Refused (422) for a file without a byte."""
    if not data:
        raise Refused(422, "empty_image", "an image is required and the body is empty.")


async def read_form_upload(request: Request, limits: UploadLimits) -> bytes:
    """As `read_upload`, but multipart alone."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(
            415,
            "unsupported_media_type",
            "the body must be multipart/form-data with a file field 'image': -F image=@FILE.",
        )
    return await read_upload(request, limits)


def bounded(request: Request, limits: UploadLimits) -> Request:
    """`request`, whose body raises Refused (413) above `max_bytes`: at once where so much is declared."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.max_bytes:
        raise _too_large(limits)
    return Request(request.scope, counted(request.receive, limits))


def check_header(data: bytes, limits: UploadLimits) -> tuple[int, int]:
    """(height, width) as stored, read from the image's header; nothing is decoded.

    Raises Refused: 415 for a file whose first bytes are no JPEG's, PNG's or WebP's, 413 above the limits, 422 for a
    damaged header.
    """
    form = sniff(data)
    if form is None:
        raise Refused(
            415,
            "unsupported_image",
            "the file is no JPEG, PNG or WebP image by its first bytes.",
            detail={"formats": list(FORMATS), "first_bytes": data[:8].hex()},
        )
    if form == "WEBP" and (claimed := webp_size(data)) is not None:
        _check_size(*claimed, limits)
    if form == "JPEG" and (scans := jpeg_scans(data)) > MAX_JPEG_SCANS:
        raise Refused(
            422,
            "too_many_scans",
            f"a JPEG may have {MAX_JPEG_SCANS} scans, got {scans}: save it again.",
            detail={"max_scans": MAX_JPEG_SCANS, "scans": scans},
        )
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits, "more than Pillow opens") from error
    except UnidentifiedImageError as error:
        raise Refused(422, "broken_image", f"the file starts as a {form} and its header is damaged.") from error
    except Exception as error:  # a parser meets hostile bytes: whatever it raises is the file's fault
        raise Refused(422, "broken_image", f"the image's header cannot be read: {error}.") from error
    _check_size(width, height, limits)
    return height, width


def decode(data: bytes) -> Photo:
    """uint8 [H, W, 3] RGB as a viewer shows it: upright by EXIF, transparency over white, an animation's first frame.

    Grey (8 and 16 bits), palette and CMYK are converted, as `prepare` does. Raises Refused (422) where the data is
    damaged. Slow: call it off the event loop.
    """
    try:
        return decode_image(data)
    except DataError as error:
        raise Refused(422, "broken_image", f"the image cannot be decoded: {error}") from error
    except Exception as error:  # as above
        raise Refused(422, "broken_image", f"the image cannot be decoded: {type(error).__name__}: {error}") from error


class PixelGate:
    """Bounds the pixels that are decoded and not yet answered, and so the memory. Belongs to one event loop."""

    def __init__(self, max_pixels: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max = max_pixels
        self._clock = clock
        self._inside = 0
        # Pixels that left, and the time in which they did while the gate was in use; both fade.
        self._left = 0.0
        self._busy_s = 0.0
        self._seen_at = clock()

    @property
    def inside(self) -> int:
        """Pixels in work now."""
        return self._inside

    @contextlib.contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        """Hold room for `pixels`; raises Overloaded where there is none now."""
        if self._inside + pixels > self._max:
            wait_s = self.retry_after_s(pixels)
            raise Overloaded(
                f"the endpoint has as many images in work as it may hold; try again in {wait_s} s.", wait_s
            )
        self._pass_time()
        self._inside += pixels
        try:
            yield
        finally:
            self._pass_time()
            self._inside -= pixels
            self._left += pixels

    def retry_after_s(self, pixels: int) -> int:
        """Whole seconds in which there should be room for `pixels`, at the speed of the last seconds."""
        self._pass_time()
        missing = self._inside + pixels - self._max
        if missing <= 0 or self._left <= 0:
            return 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(missing * self._busy_s / self._left)))

    def _pass_time(self) -> None:
        now = self._clock()
        passed = now - self._seen_at
        self._seen_at = now
        if self._inside:  # an empty gate says nothing about how fast it empties
            fade = math.exp(-passed / SPEED_MEMORY_S)
            self._left *= fade
            self._busy_s = self._busy_s * fade + passed


class BodyGate:
    """Bounds the bytes of all request bodies that are in one process: each holds its own until its request has ended.

    The bound of one body does not bound many: with 20 MiB each, 50 uploads at once are a gigabyte.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._inside = 0

    @property
    def inside(self) -> int:
        """Bytes held now."""
        return self._inside

    def take(self, size: int) -> None:
        """Hold room for `size` more bytes; raises Overloaded where there is none now."""
        if self._inside + size > self._max:
            raise Overloaded("the endpoint reads as many uploads as it may hold; try again in 1 s.")
        self._inside += size

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self._inside -= size


async def _form_file(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=16, max_part_size=64 * 1024) as form:
        part = form.get(FIELD)
        if not isinstance(part, UploadFile):
            raise missing_field(form)
        return await part.read()


def missing_field(form: Iterable[str]) -> Refused:
    """The refusal of a form, of which the names of the fields are given, without an image's file."""
    fields = ", ".join(sorted(form))[:200] or "none"
    return Refused(
        422,
        "missing_field",
        f"a file field '{FIELD}' is required, got fields: {fields}. Send -F {FIELD}=@photo.jpg.",
        detail={"field": FIELD},
    )


def counted(receive: Receive, limits: UploadLimits) -> Receive:
    """`receive` that refuses once more than `max_bytes` of body came through."""
    seen = 0

    async def receive_some() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limits.max_bytes:
            raise _too_large(limits)
        return message

    return receive_some


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
        detail={"max_bytes": limits.max_bytes},
    )


def _too_many_pixels(limits: UploadLimits, what: str) -> Refused:
    return Refused(
        413,
        "image_too_large",
        f"an image may have {limits.max_pixels} pixels and {limits.max_side} a side, got {what}: send it scaled down.",
        detail={"max_pixels": limits.max_pixels, "max_side": limits.max_side},
    )
