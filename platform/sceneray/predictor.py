"""Images in, masks out: the one place that turns photographs into answers, in a script, a job or a server.

Only images of equal shape share a forward pass: padding would shift PSPNet's pyramid pooling, and a padded batch would
give other answers than its images alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sceneray import bundle as bundles
from sceneray import runtimes
from sceneray.bundle import Bundle
from sceneray.data.store import ClassInfo
from sceneray.errors import BundleError, ConfigError, DataError
from sceneray.masks import Mask, Photo
from sceneray.models.pspnet import upscale
from sceneray.runtimes import Precision

# Pixels of one forward pass: memory grows with them, and past this nothing gets faster.
PIXEL_BUDGET = 4_194_304
# A device that answers the golden image worse than this computes something else than what was exported.
GOLDEN_AGREEMENT = 0.9


class Predictor:
    """A bundle's network on a device. Holds no state between calls, so threads may share one."""

    def __init__(
        self,
        bundle: Bundle,
        device: str | None = None,
        pixel_budget: int = PIXEL_BUDGET,
        runtime: str | None = "torch",
        precision: Precision = "fp32",
    ) -> None:
        """`device` as torch names it; None: CUDA where there is one. `pixel_budget`: pixels of one forward pass.

        `runtime`: what computes (`runtimes.RUNTIMES`); None: what serves this bundle fastest here. `precision`: in
        what; `auto` is bf16 on GPUs that compute in it, faster and with other answers where two classes are close.
        """
        if pixel_budget < 1:
            raise ConfigError(f"pixel_budget must be at least 1, got {pixel_budget}.")
        self._bundle = bundle
        self._device = _device(device)
        self._budget = pixel_budget
        self.runtime = runtime or runtimes.best(bundle, self._device)
        self.scorer = runtimes.start(self.runtime, bundle, self._device, precision=precision)
        self.precision: Precision = "bf16" if runtimes.dtype_of(precision, self._device) else "fp32"

    @classmethod
    def load(
        cls,
        url: str,
        device: str | None = None,
        pixel_budget: int = PIXEL_BUDGET,
        runtime: str | None = "torch",
        precision: Precision = "fp32",
    ) -> Predictor:
        """The predictor of the bundle at `url`. Raises BundleError where it cannot be loaded."""
        return cls(bundles.load(url), device, pixel_budget, runtime, precision)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes, in the order of their ids."""
        return self._bundle.classes

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._device

    @property
    def min_side(self) -> int:
        """The least height and width of an image, in pixels."""
        return self._bundle.min_side

    @property
    def info(self) -> dict[str, Any]:
        """bundle.json and the bundle's digest."""
        return {**self._bundle.about, "digest": self._bundle.digest}

    def predict(self, images: Sequence[Photo]) -> list[Mask]:
        """Class ids uint8 [H, W] for each image uint8 [H, W, 3] (RGB, 0 to 255), in the order given.

        Raises DataError for an image of another type or shape, or smaller than `min_side`.
        """
        for image in images:
            self.check(image)
        answers: dict[int, Mask] = {}
        for chunk in _chunks(images, self._budget):
            found = self.scores([images[index] for index in chunk])
            for index, scores in zip(chunk, found, strict=True):
                answers[index], _ = self.finish(scores, images[index].shape[:2])
        return [answers[i] for i in range(len(images))]

    def check(self, image: Photo) -> None:
        """Raise DataError where `image` is nothing that `predict` takes."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f"an image must be a uint8 array [H, W, 3] (RGB), got {what}.")
        if min(image.shape[:2]) < self.min_side:
            height, width = image.shape[:2]
            raise DataError(
                f"an image must be at least {self.min_side} pixels high and wide for this network, got "
                f"{height} × {width} (height × width). Send a larger one."
            )

    def self_check(self) -> float:
        """Answer the golden image and return the share of pixels that agree with the exporter's answer.

        Raises BundleError where the share is below GOLDEN_AGREEMENT: rounding differs between devices, answers do not.
        """
        mask = self.predict([self._bundle.golden])[0]
        agreement = float((mask == self._bundle.golden_mask).mean())
        if agreement < GOLDEN_AGREEMENT:
            raise BundleError(
                f"{self._bundle.url} answers its golden image with {agreement:.1%} of the pixels it had when it was "
                f"exported; at least {GOLDEN_AGREEMENT:.0%} are expected. Check the device ({self._device}), the "
                f"precision ({self.precision}) and the library versions in bundle.json, or export it again."
            )
        return agreement

    @torch.inference_mode()
    def scores(self, images: Sequence[Photo], pad_to: int = 1) -> Tensor:
        """Logits float [B, C, h, w] at the features' size, on the device, of images of one shape.

        With `pad_to` above 1 the batch is filled up with black images to that size, and their scores are left out: the
        kernels that a library chooses depend on the size of a batch, and so do a score's last bits.
        """
        count = max(len(images), pad_to)
        batch = np.zeros((count, *images[0].shape), np.uint8)
        for row, image in zip(batch, images, strict=False):
            row[...] = image
        return self.scorer(batch)[: len(images)]

    @torch.inference_mode()
    def finish(self, scores: Tensor, size: Sequence[int], confidence: bool = False) -> tuple[Mask, Mask | None]:
        """One image's scores [C, h, w] as class ids uint8 [H, W] at `size`, and how sure each is: uint8 [H, W], the
        softmax probability of the pixel's class from 0 to 255; None where it is not asked for."""
        full = upscale(scores[None], size)[0]
        mask = best_class(full)
        if not confidence:
            return mask, None
        top = (full - full.amax(dim=0)).exp().sum(dim=0).reciprocal()  # softmax of the largest score
        sure: Mask = (top * 255).round().to(torch.uint8).cpu().numpy()
        return mask, sure

    @torch.inference_mode()
    def probabilities(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """One image's scores [C, h, w] as class probabilities float [C, H, W] at `size`, on the device."""
        return upscale(scores[None], size)[0].softmax(dim=0)


def best_class(scores: Tensor) -> Mask:
    """The class with the largest of scores float [C, H, W], at most 256 of them, in each pixel: uint8 [H, W].

    The first of equals, as argmax has it; which on a CPU takes ten times as long and longer, for it goes through the
    classes of one pixel after the other, and they lie far from each other.
    """
    if scores.device.type != "cpu":
        found: Mask = scores.argmax(dim=0).to(torch.uint8).cpu().numpy()
        return found
    planes = scores.numpy()
    best, mask = planes[0].copy(), np.zeros(planes.shape[1:], np.uint8)
    for number, plane in enumerate(planes[1:], start=1):
        higher = (plane > best).view(np.uint8)
        np.maximum(mask, higher * np.uint8(number), out=mask)  # numbers grow: the last one that was higher stays
        np.maximum(best, plane, out=best)
    return mask


def _chunks(images: Sequence[Photo], budget: int) -> Iterator[list[int]]:
    """Indices of images of one shape, at most `budget` pixels together; an image above the budget goes alone."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(index)
    for shape, indices in by_shape.items():
        size = max(1, budget // (shape[0] * shape[1]))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'. Use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' was asked for, but torch finds no CUDA device here. Use cpu.")
    return device
