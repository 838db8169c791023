"""Large images in windows: every tile has one shape, so tiles of photographs of any size run together.

The rule is hszhao/semseg's (tool/test.py): windows two thirds of their side apart, the last ones shifted back to the
border, class probabilities added where windows overlap. Bands of rows are finished as soon as no later window reaches
them, so that memory follows the width of the image and not its height.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sceneray.masks import Mask, Photo
from sceneray.models.pspnet import MEAN


def starts(length: int, side: int) -> list[int]:
    """Where windows of `side` pixels begin along `length` pixels: two thirds apart, the last one flush with the end."""
    stride = -(-2 * side // 3)
    count = 1 + max(0, -(-(length - side) // stride))
    return [min(number * stride, max(0, length - side)) for number in range(count)]


def padded(image: Photo, side: int) -> Photo:
    """`image` (uint8 [H, W, 3]) with at least `side` rows and columns: ImageNet's mean colour below and to the right,
    as training crops are filled."""
    height, width = image.shape[:2]
    if height >= side and width >= side:
        return image
    grown = np.empty((max(height, side), max(width, side), 3), np.uint8)
    grown[...] = np.asarray(MEAN).round().astype(np.uint8)
    grown[:height, :width] = image
    return grown


class Bands:
    """Probabilities of one image's windows, added up, and given back as finished bands of rows from top to bottom.

    Holds float32 [classes, side, width]. Belongs to one thread at a time.
    """

    def __init__(self, width: int, side: int, confidence: bool = False) -> None:
        self._width = width
        self._side = side
        self._confidence = confidence
        self._top = 0  # the row of the image that the buffer begins with
        self._sum: Tensor | None = None

    @torch.inference_mode()
    def add(self, top: int, left: int, probabilities: Tensor) -> list[tuple[Mask, Mask | None]]:
        """Take a window's probabilities float [C, side, side]; windows come row by row from the top, `top` never
        falling. Returns the band that no window reaches any more, where there is one."""
        finished = [self._take(top - self._top)] if top > self._top else []
        if self._sum is None:
            self._sum = probabilities.new_zeros((probabilities.shape[0], self._side, self._width))
        self._sum[:, :, left : left + self._side] += probabilities
        return finished

    @torch.inference_mode()
    def rest(self) -> tuple[Mask, Mask | None]:
        """The last band: everything below the bands given so far."""
        return self._take(self._side)

    def _take(self, rows: int) -> tuple[Mask, Mask | None]:
        """The first `rows` rows as class ids and confidence, uint8 [rows, width]; they leave the buffer."""
        assert self._sum is not None
        done, kept = self._sum[:, :rows], self._sum[:, rows:]
        largest, ids = done.max(dim=0)
        # Over the classes the probabilities of each window add up to 1, so their sum counts the windows.
        sure = (largest / done.sum(dim=0) * 255).round().to(torch.uint8).cpu().numpy() if self._confidence else None
        self._sum = torch.cat([kept, torch.zeros_like(done)], dim=1)
        self._top += rows
        return ids.to(torch.uint8).cpu().numpy(), sure
