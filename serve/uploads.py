"""Several images in one request, under the bounds of one: its bytes, and its pixels, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve.admission import (
    FIELD,
    Refused,
    UploadLimits,
    bounded,
    check_header,
    check_not_empty,
    missing_field,
    read_upload,
)

MAX_IMAGES = 16
MAX_NAME = 255


@dataclass(frozen=True)
class Upload:
    """One image file as it came; `name` is what the caller calls it, which nothing here trusts."""

    data: bytes
    name: str | None = None


async def read_uploads(request: Request, limits: UploadLimits) -> list[Upload]:
    """The raw body, or every file of the multipart field `image`, in order: one to MAX_IMAGES.

    Raises Refused as `read_upload` does. Of several files, an empty one is not refused here: it fails alone.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return [Upload(await read_upload(request, limits))]
    body = bounded(request, limits)
    async with body.form(max_files=MAX_IMAGES, max_fields=16, max_part_size=64 * 1024) as form:
        parts = [part for part in form.getlist(FIELD) if isinstance(part, UploadFile)]
        if not parts:
            raise missing_field(form)
        uploads = [Upload(await part.read(), (part.filename or "")[:MAX_NAME] or None) for part in parts]
    if len(uploads) == 1:
        check_not_empty(uploads[0].data)
    return uploads


def check_together(uploads: Sequence[Upload], limits: UploadLimits) -> None:
    """Raise Refused (413) where the images, by their headers, have more pixels in all than one image may have.

    A file whose header is refused counts nothing: it fails by itself.
    """
    pixels = 0
    for upload in uploads:
        try:
            height, width = check_header(upload.data, limits)
        except Refused:
            continue
        pixels += height * width
    if pixels > limits.max_pixels:
        raise Refused(
            413,
            "images_too_large",
            f"the images of a request may have {limits.max_pixels} pixels in all, got {pixels}: send fewer at a time.",
        )
