"""Random changes of a training sample, photograph and label together.

Each transform is a function `(pair, settings, rng) -> pair`; what it draws comes from `rng` alone, which is seeded by
(seed, position), so a sample looks the same whichever worker or process prepares it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from sceneray.config import AugmentSettings
from sceneray.errors import ConfigError

# Padding around a photograph that is smaller than the crop: ImageNet's mean colour, which normalises to about zero.
PAD_COLOUR = (124, 116, 104)
PAD_LABEL = 255


class Pair(NamedTuple):
    """A photograph (mode RGB) and its label (mode L, class ids, 255 = ignore) of the same size."""

    image: Image.Image
    label: Image.Image


Transform = Callable[[Pair, AugmentSettings, np.random.Generator], Pair]


def scale_crop(pair: Pair, settings: AugmentSettings, rng: np.random.Generator) -> Pair:
    """Resize by a random factor and cut a random window of the crop's size; pads where the photograph is smaller.

    Only the part that survives the crop is resampled (bilinear for the photograph, nearest for the label).
    """
    height, width = settings.crop
    factor = rng.uniform(*settings.scale)
    scaled_w, scaled_h = max(1, round(pair.image.width * factor)), max(1, round(pair.image.height * factor))
    left, target_x, cut_w = _window(scaled_w, width, rng)
    top, target_y, cut_h = _window(scaled_h, height, rng)
    fx, fy = pair.image.width / scaled_w, pair.image.height / scaled_h
    box = (left * fx, top * fy, (left + cut_w) * fx, (top + cut_h) * fy)
    image = pair.image.resize((cut_w, cut_h), Image.Resampling.BILINEAR, box=box)
    label = pair.label.resize((cut_w, cut_h), Image.Resampling.NEAREST, box=box)
    if (cut_w, cut_h) == (width, height):
        return Pair(image, label)
    canvas = Pair(Image.new("RGB", (width, height), PAD_COLOUR), Image.new("L", (width, height), PAD_LABEL))
    canvas.image.paste(image, (target_x, target_y))
    canvas.label.paste(label, (target_x, target_y))
    return canvas


def flip(pair: Pair, settings: AugmentSettings, rng: np.random.Generator) -> Pair:
    """Mirror left and right with probability `flip`."""
    if rng.random() >= settings.flip:
        return pair
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    return Pair(pair.image.transpose(mirror), pair.label.transpose(mirror))


def colour_jitter(pair: Pair, settings: AugmentSettings, rng: np.random.Generator) -> Pair:
    """Change brightness, contrast and saturation, each by a factor drawn from 1 ± its setting."""
    image = pair.image
    changes = (
        (ImageEnhance.Brightness, settings.brightness),
        (ImageEnhance.Contrast, settings.contrast),
        (ImageEnhance.Color, settings.saturation),
    )
    for enhance, amount in changes:
        factor = rng.uniform(1 - amount, 1 + amount)
        if amount > 0:
            image = enhance(image).enhance(factor)
    return Pair(image, pair.label)


TRANSFORMS: dict[str, Transform] = {
    "scale_crop": scale_crop,
    "flip": flip,
    "colour_jitter": colour_jitter,
}


def augment(
    image: np.ndarray, label: np.ndarray, settings: AugmentSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One training sample: uint8 [H, W, 3] and uint8 [H, W] in, both of the crop's size out.

    Raises ConfigError where the configured transforms do not end at the crop's size.
    """
    pair = Pair(Image.fromarray(image), Image.fromarray(label))
    for name in settings.transforms:
        pair = TRANSFORMS[name](pair, settings, rng)
    height, width = settings.crop
    if pair.image.size != (width, height):
        raise ConfigError(
            f"augment.transforms {list(settings.transforms)} end at {pair.image.height}×{pair.image.width}, not at the "
            f"crop {height}×{width}: batches need one size, add scale_crop."
        )
    return np.asarray(pair.image), np.asarray(pair.label)


def _window(size: int, crop: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: where the cut starts, where it lands in the crop, and its length."""
    start = int(rng.integers(0, max(size - crop, 0) + 1))
    return start, max(crop - size, 0) // 2, min(size, crop)
