"""Several images in one request, one answer each: a JSON array, or a zip with a manifest.

Clients read what their language brings: JSON and zip are in every standard library, multipart/mixed answers in few. A
request of one image is answered plainly. Formats that are JSON make an array of schemas.ImageBody, in the order of the
request. The others make a zip, stored (PNG and JPEG do not shrink again), of the answers and `manifest.json`, the same
array with the files' names. An image that cannot be answered has its error in its place, and the others their answers;
a fault that is not one image's (overload, an unknown class) is the whole request's.

The images share the bounds of one (uploads.check_together), and run together where their shapes agree.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sceneray.errors import DataError
from serve.admission import Refused, check_not_empty
from serve.answers import SUFFIXES, Unanswerable
from serve.schemas import ErrorBody
from serve.uploads import Upload

MANIFEST = "manifest.json"
# Of refusals these are about one image; any other is about the caller or the server.
OF_ONE_IMAGE = (413, 415, 422)
MAX_STEM = 64
# A zip holds a date for each file: the format's first day, so that equal answers are equal bytes.
FIRST_DAY = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Rendered:
    """One image's answer: its body, the mask's height and width, and the headers that it has alone."""

    body: bytes
    size: tuple[int, int]
    headers: dict[str, str]


Outcome = Rendered | Refused


async def all_of(uploads: Sequence[Upload], one: Callable[[Upload], Awaitable[Rendered]]) -> list[Outcome]:
    """What `one` makes of each upload, or why it is refused; all at once.

    Raises the first error that is not one image's, after ending the others.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_outcome(upload, one)) for upload in uploads]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def json_array(uploads: Sequence[Upload], outcomes: Sequence[Outcome], request_id: str) -> bytes:
    """The JSON answers of several images as one array."""
    items = []
    for upload, outcome in zip(uploads, outcomes, strict=True):
        item = json.dumps(_item(upload, outcome, request_id), separators=(",", ":")).encode()
        if isinstance(outcome, Rendered):
            item = item[:-1] + b',"answer":' + outcome.body + b"}"  # it is JSON already
        items.append(item)
    return b"[" + b",".join(items) + b"]"


def zipped(uploads: Sequence[Upload], outcomes: Sequence[Outcome], request_id: str, media_type: str) -> bytes:
    """The answers of several images, each of `media_type`, as the files of a zip, and its manifest."""
    out = io.BytesIO()
    manifest = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for index, (upload, outcome) in enumerate(zip(uploads, outcomes, strict=True)):
            item = _item(upload, outcome, request_id)
            if isinstance(outcome, Rendered):
                item["file"] = file_name(index, upload.name, SUFFIXES[media_type])
                archive.writestr(zipfile.ZipInfo(item["file"], FIRST_DAY), outcome.body)
            manifest.append(item)
        archive.writestr(zipfile.ZipInfo(MANIFEST, FIRST_DAY), json.dumps(manifest, indent=2))
    return out.getvalue()


def file_name(index: int, given: str | None, suffix: str) -> str:
    """A file's name in the zip: its place, and of the caller's name what every file system takes.

    >>> file_name(3, "../../etc/My photo.jpg", ".png")
    '003-My_photo.png'
    """
    last = re.split(r"[/\\]", given or "")[-1].rpartition(".")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", last[0] or last[2])[:MAX_STEM].strip("_")
    return f"{index:03d}-{stem}{suffix}" if stem else f"{index:03d}{suffix}"


async def _outcome(upload: Upload, one: Callable[[Upload], Awaitable[Rendered]]) -> Outcome:
    try:
        check_not_empty(upload.data)
        return await one(upload)
    except DataError as error:
        return Refused(422, "unfit_image", str(error))
    except Unanswerable:
        raise
    except Refused as error:
        if error.status not in OF_ONE_IMAGE:
            raise
        return error


def _item(upload: Upload, outcome: Outcome, request_id: str) -> dict[str, Any]:
    item: dict[str, Any] = {"name": upload.name}
    if isinstance(outcome, Refused):
        error = ErrorBody(
            error=str(outcome), error_type=outcome.error_type, detail=outcome.detail, request_id=request_id
        )
        return item | {"status": outcome.status, "error": error.model_dump()}
    height, width = outcome.size
    return item | {"status": 200, "width": width, "height": height}
