"""From an index image to a photo: colours, sky, shadows, texture, light, lens and sensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sceneray.data.townscape.canvas import Canvas, Float
from sceneray.data.townscape.look import PAVEMENT, ROAD, SKY, TREE, Light

SUPERSAMPLING = 2  # sub-pixels along each side of a pixel


def develop(
    canvas: Canvas, rng: np.random.Generator, light: Light, index: NDArray[np.int32], shade: Float, rise: Float
) -> NDArray[np.uint8]:
    """The photo: paint colours, sky, shadows, texture and light, then the lens and the sensor."""
    classes = np.array(canvas.classes, dtype=np.uint8)[index]
    photo = np.array(canvas.colors, dtype=np.float32)[index]
    rough = np.array(canvas.roughness, dtype=np.float32)[index]
    grain = _noise(rng, index.shape, (96, 48, 24), (0.5, 0.35, 0.3))
    fine = rng.standard_normal(index.shape, dtype=np.float32)
    leaves = classes == TREE
    sky = classes == SKY
    texture = np.where(leaves, 0.45 * grain + 0.6 * fine, 0.7 * grain + 0.6 * fine)
    ground = (classes == ROAD) | (classes == PAVEMENT)
    patchy = _noise(rng, index.shape, (6, 14), (0.6, 0.4))
    factor = 1.0 + rough * texture + np.where(sky, 0.0, 0.05) * patchy
    factor *= np.where(ground, shade, 1.0)
    photo *= factor[..., None]
    photo[sky] = _sky(rng, light, rise, index.shape)[sky]
    photo *= np.where(sky[..., None], np.float32(1.0), np.array(light.sun, dtype=np.float32))
    rows, columns = index.shape[0] // SUPERSAMPLING, index.shape[1] // SUPERSAMPLING
    photo = photo.reshape(rows, SUPERSAMPLING, columns, SUPERSAMPLING, 3).mean(axis=(1, 3))
    contrast, lift = rng.uniform(0.85, 1.12), rng.uniform(-10, 14)
    photo = (photo - 118) * contrast + 118 + lift
    photo += rng.standard_normal(photo.shape, dtype=np.float32) * rng.uniform(1.0, 4.0)
    result: NDArray[np.uint8] = np.clip(photo + 0.5, 0, 255).astype(np.uint8)
    return result


def _sky(rng: np.random.Generator, light: Light, rise: Float, shape: tuple[int, ...]) -> Float:
    """RGB [rows, columns, 3]: from the horizon to the zenith, with clouds."""
    up = np.clip(rise * 2.2, 0, 1)[..., None] ** np.float32(0.7)
    horizon, zenith, cloud = (np.array(c, dtype=np.float32) for c in (light.horizon, light.zenith, light.cloud))
    clear = horizon + (zenith - horizon) * up
    field = _noise(rng, shape, (3, 7, 15), (0.6, 0.35, 0.2), stretch=2.0)
    cover = np.clip((field + (light.clouds - 0.5) * 2.2) * 0.9, 0, 1)[..., None] * np.float32(0.8)
    return np.asarray(clear + (cloud - clear) * cover, dtype=np.float32)


def _noise(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    cells: tuple[int, ...],
    weights: tuple[float, ...],
    stretch: float = 1.0,
) -> Float:
    """Smooth noise [rows, columns] of about unit spread: `cells` across the image's height, one octave each."""
    total = np.zeros(shape, dtype=np.float32)
    for cell, weight in zip(cells, weights, strict=True):
        wide = max(2, round(cell * shape[1] / shape[0] / stretch))
        field = Image.fromarray(rng.standard_normal((cell, wide), dtype=np.float32))
        total += np.float32(weight * 1.6) * np.asarray(field.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    return total


def majority(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class that most of each 2 × 2 block of sub-pixels shows; uint8 [rows / 2, columns / 2]."""
    a, b, c, d = classes[::2, ::2], classes[::2, 1::2], classes[1::2, ::2], classes[1::2, 1::2]
    without_a = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    result: NDArray[np.uint8] = np.where((a == b) | (a == c) | (a == d), a, without_a)
    return result
