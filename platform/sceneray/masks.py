"""Class-id masks as things to look at and to send: palette PNG, overlay, pixel shares.

A mask is uint8 [H, W]; a pixel holds a class id, or the dataset's ignore index (255), which belongs to no class.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sceneray.data.store import ClassInfo
from sceneray.errors import DataError

Mask = np.ndarray[Any, np.dtype[np.uint8]]
Photo = np.ndarray[Any, np.dtype[np.uint8]]

NO_CLASS = 255

# Level 1 of zlib: masks compress well at any level, and on large masks the encoder, not the network, is what takes
# time (roboflow/inference, pull request 2440: 148 ms to 30 ms for a 1080p mask).
PNG_LEVEL = 1


def indexed_png(mask: Mask, classes: Sequence[ClassInfo]) -> bytes:
    """`mask` (uint8 [H, W]) as an 8-bit palette PNG: indices are class ids, colours are the dataset's.

    Ids that belong to no class, 255 among them, are black. Decoding the indices gives the mask back.
    """
    picture = Image.fromarray(checked(mask))
    picture.putpalette(colour_table(classes).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def grey_png(picture: Mask) -> bytes:
    """`picture` (uint8 [H, W]: a confidence map, or the pixels of one class) as an 8-bit grey PNG."""
    out = io.BytesIO()
    Image.fromarray(checked(picture)).save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def only(mask: Mask, ids: Sequence[int]) -> Mask:
    """`mask` with every pixel that is of none of the classes `ids` set to NO_CLASS."""
    table = np.full(256, NO_CLASS, np.uint8)
    table[list(ids)] = list(ids)
    kept: Mask = table[checked(mask)]
    return kept


def overlay(image: Photo, mask: Mask, classes: Sequence[ClassInfo], opacity: float = 0.5) -> Photo:
    """`image` (uint8 [H, W, 3]) blended with the colours of `mask` (uint8 [H, W]); the result has image's shape.

    `opacity` in [0, 1] is the weight of the colour. Pixels of no class show the photograph unchanged.
    """
    if image.shape != (*checked(mask).shape, 3):
        raise DataError(f"an overlay needs an image of shape {(*mask.shape, 3)} for its mask, got {image.shape}.")
    if not 0 <= opacity <= 1:
        raise DataError(f"opacity must lie in [0, 1], got {opacity}.")
    # Whole numbers in 255ths: exact, and a quarter of the memory of floats.
    alpha = np.zeros((256, 1), np.uint16)
    alpha[[entry.id for entry in classes]] = round(255 * opacity)
    tint = colour_table(classes) * alpha
    blended: Photo = ((image * (255 - alpha)[mask] + tint[mask] + 127) // 255).astype(np.uint8)
    return blended


def shares(mask: Mask, classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """The classes present in `mask`, each as {id, name, color, share}, the largest first.

    `share` is the class's part of all pixels, in (0, 1]; pixels of no class count in the total alone.
    """
    counts = np.bincount(checked(mask).ravel(), minlength=256)
    present = [
        {"id": entry.id, "name": entry.name, "color": list(entry.color), "share": float(counts[entry.id] / mask.size)}
        for entry in classes
        if counts[entry.id]
    ]
    return sorted(present, key=lambda row: (-float(row["share"]), row["id"]))


def colour_table(classes: Sequence[ClassInfo]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [256, 3]: the colour of every id, black where an id belongs to no class."""
    table = np.zeros((256, 3), np.uint8)
    for entry in classes:
        table[entry.id] = entry.color
    return table


def checked(mask: Mask) -> Mask:
    """`mask` itself; raises DataError unless it is uint8 [H, W] with at least one pixel."""
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        raise DataError(f"a mask must be uint8 [H, W] with at least one pixel, got {mask.dtype} {list(mask.shape)}.")
    return mask
