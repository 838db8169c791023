"""Masks as run lengths and polygons: what comes back is the mask, as COCO's, Pillow's and GEOS's code read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from sceneray.data import town
from sceneray.errors import DataError
from sceneray.mask_codes import polygons, run_lengths
from sceneray.masks import Mask
from tests.mask_readers import decoded, filled

IDS = (0, 1, 2)
MASKS = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=14),
    elements=st.sampled_from([0, 0, 0, 1, 1, 2, 255]),  # enough of one class that its regions have holes
)


def picture(*rows: str) -> Mask:
    """A mask drawn in text: a dot is of no class, a digit is an id."""
    return np.array([[255 if pixel == "." else int(pixel) for pixel in row] for row in rows], np.uint8)


# Each with the regions of class 1, and how many holes they have together.
DRAWN = {
    "one pixel": (picture("1"), 1, 0),
    "one pixel in the middle": (picture("...", ".1.", "..."), 1, 0),
    "the whole mask": (picture("11", "11"), 1, 0),
    "none of it": (picture("..", ".."), 0, 0),
    "a line": (picture("1111"), 1, 0),
    "two pixels that touch by a corner": (picture("1.", ".1"), 2, 0),
    "a ring": (picture("111", "1.1", "111"), 1, 1),
    "a hole with an island": (picture("11111", "1...1", "1.1.1", "1...1", "11111"), 2, 1),
    "a hole with an island that touches it by a corner": (picture("1111", "11.1", "1.11", "1111"), 1, 2),
    "an island with a hole in it": (
        picture("1111111", "1.....1", "1.111.1", "1.1.1.1", "1.111.1", "1.....1", "1111111"),
        2,
        2,
    ),
    "a hole that touches the outside by a corner": (picture("1111", "1.11", "11.1", "111."), 1, 2),
    "a ring closed by a corner alone": (picture("111", "1.1", "11."), 1, 1),
    "holes side by side, one above the other's end": (picture("11111", "1.111", "1.1.1", "111.1", "11111"), 1, 2),
    "a staircase": (picture("1..", "11.", "111"), 1, 0),
}


# In COCO's decoder (pycocotools 2.0.11, _mask.pyx): NumPy 2 asks for another argument of `__array__`.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@given(mask=MASKS)
@example(mask=picture("1"))
@example(mask=picture("11", "11"))
@example(mask=picture(".."))
def test_run_lengths_give_the_mask_back(mask: Mask) -> None:
    """COCO's own decoder, and ten lines that know only the format, read the pixels of each class."""
    codes = run_lengths(mask, IDS)
    assert list(codes) == list(IDS)
    for id_, code in codes.items():
        assert code["size"] == list(mask.shape)
        assert np.array_equal(coco.decode(code), mask == id_)
        assert np.array_equal(decoded(code), mask == id_)


@given(mask=MASKS)
@example(mask=picture("11.", "1.1", ".11"))
def test_filled_polygons_give_the_mask_back(mask: Mask) -> None:
    """Pillow fills the rings of each class: every pixel of the class is in one polygon, and no other pixel in any."""
    for id_, regions in polygons(mask, IDS).items():
        assert np.array_equal(filled(regions, mask.shape), mask == id_)


@given(mask=MASKS)
@example(mask=picture("11.", "1.1", ".11"))
def test_polygons_are_valid_geometry(mask: Mask) -> None:
    """For GEOS they are valid, outlines turn one way and holes the other, and the area is the number of pixels."""
    for id_, regions in polygons(mask, IDS).items():
        shapes = [shapely.Polygon(outline, holes) for outline, *holes in regions]
        together = shapely.MultiPolygon(shapes)
        assert together.is_valid, shapely.is_valid_reason(together)
        assert together.area == (mask == id_).sum()
        for outline, *holes in regions:
            assert shapely.LinearRing(outline).is_ccw  # in numbers; on a screen, where y points down, clockwise
            assert not any(shapely.LinearRing(hole).is_ccw for hole in holes)


@given(mask=MASKS)
def test_rings_are_closed_and_hold_corners_alone(mask: Mask) -> None:
    """A ring ends where it begins, every step is along x or along y, and no two steps in a row go the same way."""
    for regions in polygons(mask, IDS).values():
        for ring in (np.array(ring) for region in regions for ring in region):
            assert (ring[0] == ring[-1]).all()
            along_x, along_y = (np.diff(ring, axis=0) != 0).T
            assert (along_x != along_y).all()
            assert (along_x != np.roll(along_x, 1)).all()


@pytest.mark.parametrize("name", DRAWN)
def test_regions_and_holes_are_counted_as_drawn(name: str) -> None:
    """Regions are connected by edges; a hole belongs to the region around it, and an island in it is a region."""
    mask, regions, holes = DRAWN[name]
    found = polygons(mask, [1])[1]
    assert len(found) == regions
    assert sum(len(region) - 1 for region in found) == holes
    assert np.array_equal(filled(found, mask.shape), mask == 1)


def test_the_convention_is_pixel_edges() -> None:
    """The pixel in column 2 and row 1 is the square from (2, 1) to (3, 2), begun at its upper left corner."""
    mask = picture("....", "..1.")
    assert polygons(mask, [1]) == {1: [[[[2, 1], [3, 1], [3, 2], [2, 2], [2, 1]]]]}


def test_a_scene_of_many_classes_comes_back() -> None:
    """A drawn street scene, all its classes in one call: polygons and run lengths both give the scene back."""
    _, mask = town.draw(3, 180, 240)
    ids = [entry.id for entry in town.CLASSES]
    seen = np.full_like(mask, 255)
    for id_, regions in polygons(mask, ids).items():
        seen[filled(regions, mask.shape)] = id_
    assert np.array_equal(seen, mask)
    for id_, code in run_lengths(mask, ids).items():
        assert np.array_equal(decoded(code), mask == id_)


def test_only_the_ids_asked_for_are_coded() -> None:
    """An id that is not asked for is as the outside; one that is absent has no polygon and a run of nothing."""
    mask = picture("01", "01")
    assert list(polygons(mask, [1])) == [1]
    assert polygons(mask, [7]) == {7: []}
    assert not decoded(run_lengths(mask, [7])[7]).any()


@pytest.mark.parametrize("encode", [run_lengths, polygons])
def test_what_is_no_mask_is_refused(encode: Any) -> None:
    """Another dtype is an error that says what came."""
    with pytest.raises(DataError, match="int64"):
        encode(np.zeros((2, 2), np.int64), [0])
