"""The forms of an answer, chosen by `Accept`. To add one: a function from Answered to bytes, and a line in ANSWERS."""

from __future__ import annotations

import json
from collections.abc import Callable

from sceneray.data.images import encode_jpeg
from sceneray.masks import indexed_png, overlay, shares
from serve.admission import Refused
from serve.schemas import Answered

JPEG_QUALITY = 90


def mask_png(answered: Answered) -> bytes:
    """The mask: 8-bit palette PNG, indices are class ids, colours are the dataset's."""
    return indexed_png(answered.mask, answered.model.classes)


def summary_json(answered: Answered) -> bytes:
    """Size, the classes present with their share of the pixels, and the model (schemas.SegmentationBody)."""
    height, width = answered.mask.shape
    body = {
        "width": width,
        "height": height,
        "classes": shares(answered.mask, answered.model.classes),
        "model": {"name": answered.model.name, "version": answered.model.version},
    }
    return json.dumps(body).encode()


def overlay_jpeg(answered: Answered) -> bytes:
    """The photograph blended with the mask's colours."""
    return encode_jpeg(overlay(answered.image, answered.mask, answered.model.classes), JPEG_QUALITY)


# In order of preference where a caller has none.
ANSWERS: dict[str, Callable[[Answered], bytes]] = {
    "image/png": mask_png,
    "application/json": summary_json,
    "image/jpeg": overlay_jpeg,
}
# What `?view=` narrows the choice to.
VIEWS: dict[str, tuple[str, ...]] = {"mask": tuple(ANSWERS), "overlay": ("image/jpeg",)}


def choose(accept: str | None, view: str = "mask") -> str:
    """The media type that answers an Accept header (RFC 9110, 12.5.1); none or */*: the first of the view.

    Raises Refused (406) where nothing offered is acceptable.
    """
    offers = VIEWS[view]
    ranges = _ranges(accept or "*/*")
    quality = {offer: _quality(offer, ranges) for offer in offers}
    best = max(offers, key=lambda offer: quality[offer])  # the earlier offer wins a tie
    if quality[best] <= 0:
        raise Refused(406, "not_acceptable", f"view={view} answers {' or '.join(offers)}, got Accept: {accept}.")
    return best


def _ranges(accept: str) -> dict[str, float]:
    """Media ranges of an Accept header with their q; a q that is no number counts as 0."""
    ranges = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        q = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            ranges[name] = float(q)
        except ValueError:
            ranges[name] = 0.0
    return ranges


def _quality(offer: str, ranges: dict[str, float]) -> float:
    """The most specific range decides."""
    kind = offer.partition("/")[0]
    for name in (offer, f"{kind}/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
