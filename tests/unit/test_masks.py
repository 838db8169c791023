"""Masks as pictures: what is encoded comes back, colours are the dataset's, shares add up."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from sceneray.data.images import decode_label
from sceneray.data.store import ClassInfo
from sceneray.errors import DataError
from sceneray.masks import indexed_png, overlay, shares

CLASSES = (ClassInfo(0, "sky", (70, 130, 180)), ClassInfo(1, "road", (128, 64, 128)), ClassInfo(2, "car", (0, 0, 142)))
SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)


@given(mask=arrays.arrays(np.uint8, SHAPES))
def test_a_png_gives_its_mask_back(mask: Any) -> None:
    """Any uint8 mask, 255 included, decodes from its PNG to the same ids."""
    assert np.array_equal(decode_label(indexed_png(mask, CLASSES)), mask)


def test_a_png_shows_the_datasets_colours() -> None:
    """Opened as a picture, each class has its colour, and ids of no class (255 among them) are black."""
    mask = np.array([[0, 1, 2, 9, 255]], np.uint8)
    picture = Image.open(io.BytesIO(indexed_png(mask, CLASSES)))
    assert picture.mode == "P"
    colours = np.asarray(picture.convert("RGB"))[0].tolist()
    assert colours == [[70, 130, 180], [128, 64, 128], [0, 0, 142], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.5, 1.0])
def test_an_overlay_is_the_weighted_mean_of_photograph_and_colour(opacity: float) -> None:
    """Each channel is within one step of the exact blend; pixels of no class keep the photograph."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (20, 30))
    blended = overlay(image, mask, CLASSES, opacity)
    colours = np.array([entry.color for entry in CLASSES] + [(0, 0, 0)])[np.minimum(mask, 3)]
    exact = np.where(mask[..., None] == 255, image, (1 - opacity) * image + opacity * colours)
    assert blended.dtype == np.uint8
    assert np.abs(blended - exact).max() <= 1
    assert np.array_equal(blended[mask == 255], image[mask == 255])


@given(mask=arrays.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 2, 255])))
def test_shares_count_every_pixel(mask: Any) -> None:
    """Shares are the classes' parts of all pixels, largest first; with the pixels of no class they add up to one."""
    rows = shares(mask, CLASSES)
    assert {row["id"]: round(row["share"] * mask.size) for row in rows} == {
        id_: count for id_ in (0, 1, 2) if (count := int((mask == id_).sum()))
    }
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) + (mask == 255).mean() == pytest.approx(1)


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 1), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    """Another dtype, another number of dimensions, or no pixel at all: an error that says what came."""
    with pytest.raises(DataError, match="uint8"):
        indexed_png(mask, CLASSES)


def test_an_overlay_refuses_an_image_of_another_size() -> None:
    """Image and mask must cover the same pixels."""
    with pytest.raises(DataError, match=r"\(4, 5, 3\)"):
        overlay(np.zeros((5, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), CLASSES)
