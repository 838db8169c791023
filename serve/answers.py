"""The formats of an answer. To add one: a function from Answered and Wish to bytes, and a line in FORMATS."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from sceneray.data.images import encode_jpeg
from sceneray.errors import unknown_name
from sceneray.mask_codes import count_borders, polygons, run_lengths
from sceneray.masks import NO_CLASS, grey_png, indexed_png, only, overlay, shares
from serve.admission import Refused
from serve.schemas import Answered

JPEG_QUALITY = 90
WEBP_QUALITY = 85
# Of a 1080p overlay, libwebp's fastest method takes a fifth of its default one's time for half as many bytes again.
WEBP_METHOD = 0
OPACITY = 0.5
# A 1080p mask of a street has about 40,000; one second's work is about this many.
MAX_BORDERS = 400_000


class Unanswerable(Refused):
    """What was asked for cannot be answered, whatever the image (422)."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(422, error_type, message)


@dataclass(frozen=True)
class Wish:
    """What a caller may say of the answer, beside its format."""

    media_type: str
    include: frozenset[str] = frozenset()  # of INCLUDES
    opacity: float = OPACITY
    confidence: bool = False


@dataclass(frozen=True)
class Format:
    """One form of answer. `media_types`: the first is the one for callers who accept any."""

    media_types: tuple[str, ...]
    render: Callable[[Answered, Wish], bytes]
    description: str
    parameters: frozenset[str] = frozenset()  # of the query, beside those that every format takes
    confidence: bool = False  # it is drawn from the confidence map
    by_accept: bool = True  # Accept alone may choose it


def mask_png(answered: Answered, _: Wish) -> bytes:
    """The mask: 8-bit palette PNG, indices are class ids, colours are the dataset's."""
    return indexed_png(answered.mask, answered.model.classes)


def blend(answered: Answered, wish: Wish) -> bytes:
    """The photograph blended with the mask's colours."""
    blended = overlay(answered.image, answered.mask, answered.model.classes, wish.opacity)
    if wish.media_type == "image/jpeg":
        return encode_jpeg(blended, JPEG_QUALITY)
    out = io.BytesIO()
    Image.fromarray(blended).save(out, "WEBP", quality=WEBP_QUALITY, method=WEBP_METHOD)
    return out.getvalue()


def summary(answered: Answered, wish: Wish) -> bytes:
    """Size, the classes present with their share of the pixels, the model, and what `include` names: schemas.

    SegmentationBody.
    """
    height, width = answered.mask.shape
    classes = shares(answered.mask, answered.model.classes)
    ids = [entry["id"] for entry in classes]
    for name, encode in INCLUDES.items():
        if name in wish.include and encode is not None:
            _check_outlines(name, answered)
            codes = encode(answered.mask, ids)
            for entry in classes:
                entry[name] = codes[entry["id"]]
    body: dict[str, Any] = {
        "width": width,
        "height": height,
        "classes": classes,
        "model": {"name": answered.model.name, "version": answered.model.version},
    }
    if "mask" in wish.include:
        body["mask"] = _base64(mask_png(answered, wish))
    if wish.confidence:
        body["confidence"] = _base64(confidence_png(answered, wish))
    return json.dumps(body, separators=(",", ":")).encode()


def _check_outlines(name: str, answered: Answered) -> None:
    """Raise Unanswerable where polygons would take many seconds and megabytes: a mask of noise."""
    if name != "polygons":
        return
    borders = count_borders(answered.mask)
    if borders > MAX_BORDERS:
        raise Unanswerable(
            "too_ragged",
            f"polygons follow at most {MAX_BORDERS} edges between pixels, and this mask has {borders}: ask for "
            "include=rle or a mask.",
        )


def raw(answered: Answered, _: Wish) -> bytes:
    """The class ids, row by row; the size is in the headers (shape_headers)."""
    return answered.mask.tobytes()


def npy(answered: Answered, _: Wish) -> bytes:
    """The class ids as NumPy's own file, for `numpy.load`."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(answered.mask), allow_pickle=False)
    return out.getvalue()


def confidence_png(answered: Answered, _: Wish) -> bytes:
    """The confidence map as a grey PNG: the probability of each pixel's class, 255 for certain."""
    if answered.confidence is None:
        raise Unanswerable(
            "no_confidence", "a confidence map was asked for and this model gives none: ask without confidence."
        )
    return grey_png(answered.confidence)


def segments(answered: Answered, _: Wish) -> bytes:
    """Hugging Face's shape: label, score and black-and-white mask of each class present (schemas.SegmentBody).

    The task's own schema has the mask as a base64 picture, and an optional number as score (@huggingface/tasks,
    image-segmentation/spec/output.json); transformers' pipeline gives null for semantic models, and huggingface.js
    wanted a number. Here it is the mean confidence, and null only where the model gives no confidence.
    """
    sure = answered.confidence
    body = []
    for row in shares(answered.mask, answered.model.classes):
        inside = answered.mask == row["id"]
        score = None if sure is None else round(float(sure[inside].mean()) / 255, 4)
        mask = grey_png(np.where(inside, np.uint8(255), np.uint8(0)))
        body.append({"label": row["name"], "score": score, "mask": _base64(mask)})
    return json.dumps(body, separators=(",", ":")).encode()


# What `?include=` adds to `json`: an encoder for each class's pixels, or none where the whole mask is added.
INCLUDES: dict[str, Callable[[Any, Sequence[int]], dict[int, Any]] | None] = {
    "rle": run_lengths,
    "polygons": polygons,
    "mask": None,
}

# In order of preference where a caller has none.
FORMATS: dict[str, Format] = {
    "png": Format(("image/png",), mask_png, "the mask as a palette PNG: indices are class ids, colours the dataset's"),
    "json": Format(
        ("application/json",),
        summary,
        "size, the classes present with their shares, the model, and what `include` and `confidence` add",
        frozenset({"include", "confidence"}),
    ),
    "overlay": Format(
        ("image/jpeg", "image/webp"),
        blend,
        "the photograph blended with the mask's colours, as JPEG or WebP by Accept",
        frozenset({"opacity"}),
    ),
    "raw": Format(("application/octet-stream",), raw, "the class ids, a byte each, row by row; the size is in headers"),
    "npy": Format(("application/x-npy",), npy, "the class ids as a NumPy file, for numpy.load"),
    "confidence": Format(
        ("image/png",),
        confidence_png,
        "how probable each pixel's class is, as a grey PNG: 255 for certain",
        confidence=True,
        by_accept=False,
    ),
    "hf": Format(
        ("application/json",),
        segments,
        "Hugging Face's image-segmentation: label, score and a black-and-white mask of each class present",
        confidence=True,
        by_accept=False,
    ),
}
# What an answer is called in a zip.
SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "application/octet-stream": ".u8",
    "application/x-npy": ".npy",
}


def select(answered: Answered, classes: Sequence[str]) -> Answered:
    """`answered` with the pixels of all but these classes (names or ids) as of no class and of no confidence.

    None named: all stay. Raises Unanswerable for a class that the model does not know.
    """
    if not classes:
        return answered
    mask = only(answered.mask, [_class_id(name, answered) for name in classes])
    sure = answered.confidence
    if sure is not None:
        sure = np.where(mask == NO_CLASS, np.uint8(0), sure)
    return replace(answered, mask=mask, confidence=sure)


def shape_headers(answered: Answered) -> dict[str, str]:
    """Height, width and type of the mask: with them the bytes of `raw` are an array."""
    height, width = answered.mask.shape
    return {"x-mask-height": str(height), "x-mask-width": str(width), "x-mask-dtype": str(answered.mask.dtype)}


def _class_id(name: str, answered: Answered) -> int:
    known = {entry.name: entry.id for entry in answered.model.classes}
    ids = {str(id_): id_ for id_ in known.values()}
    found = known.get(name, ids.get(name))
    if found is None:
        raise Unanswerable("unknown_class", f"classes takes names or ids: {unknown_name('class', name, known)}.")
    return found


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
