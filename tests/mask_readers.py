"""Readers of coded masks that know the format alone, and none of our code: references for the tests of the encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sceneray.mask_codes import MultiPolygon


def decoded(code: dict[str, Any]) -> np.ndarray:
    """bool [H, W] of COCO's compressed run lengths, read by the format's description alone.

    Five bits a character from 48 up, low bits first, the sixth bit says that more come, the highest of the last five is
    the sign; from the fourth run on, the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code["counts"].encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    height, width = code["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def filled(regions: MultiPolygon, shape: tuple[int, ...]) -> np.ndarray:
    """bool [H, W]: Pillow fills each region at three times the size, where the middles of pixels lie on no edge."""
    total = np.zeros(shape, int)
    for rings in regions:
        canvas = Image.new("L", (3 * shape[1] + 1, 3 * shape[0] + 1))
        for place, ring in enumerate(rings):
            ImageDraw.Draw(canvas).polygon([(3 * x, 3 * y) for x, y in ring], fill=int(place == 0))
        total += np.asarray(canvas)[1::3, 1::3]
    assert total.max(initial=0) <= 1, "two polygons share a pixel"
    return total == 1
