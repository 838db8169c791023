"""Drawn street scenes: a pure function of the seed, exact labels, every class, and no shortcut by colour and place."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.town_difficulty import LIMIT, pixel_classifier_miou
from sceneray.data import town
from sceneray.data.images import decode_image, decode_label
from sceneray.data.layouts import LAYOUTS
from sceneray.data.listing import LayoutOptions
from sceneray.data.townscape.canvas import Camera, Canvas
from sceneray.data.townscape.photo import majority
from sceneray.errors import DataError
from tests.support import ROOT

NAMES = ["sky", "building", "road", "pavement", "tree", "car", "person", "pole"]


def digest(scene: tuple[np.ndarray, np.ndarray]) -> str:
    """sha256 of a scene's photo and label."""
    return hashlib.sha256(scene[0].tobytes() + scene[1].tobytes()).hexdigest()


def test_the_classes_are_these_in_this_order() -> None:
    """Ids are positions; names and colours differ."""
    assert [info.name for info in town.CLASSES] == NAMES
    assert [info.id for info in town.CLASSES] == list(range(8))
    assert len({info.color for info in town.CLASSES}) == 8


@settings(max_examples=15)
@given(st.integers(0, 2**40), st.integers(32, 80), st.integers(32, 80))
def test_any_seed_and_size_makes_a_scene(seed: int, height: int, width: int) -> None:
    """Photo and label have the asked size and type, the label holds class ids only, and the same seed is the same."""
    image, label = town.draw(seed, height, width)
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (label.shape, label.dtype) == ((height, width), np.uint8)
    assert label.max() < len(NAMES)
    assert image.std() > 5
    assert digest(town.draw(seed, height, width)) == digest((image, label))


def test_another_process_draws_the_same_scene() -> None:
    """Neither the process's hash seed nor what was drawn before matters."""
    script = (
        "import hashlib; from sceneray.data import town; image, label = town.draw(7, 48, 64); "
        "print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(ROOT / "platform"), "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == digest(town.draw(7, 48, 64))


def test_another_seed_is_another_scene() -> None:
    """Twenty seeds make twenty photos and twenty labels."""
    scenes = [town.draw(seed, 48, 64) for seed in range(20)]
    assert len({image.tobytes() for image, _ in scenes}) == 20
    assert len({label.tobytes() for _, label in scenes}) == 20


def test_splits_never_share_a_scene() -> None:
    """Seeds of train, val and held-out scenes are disjoint, for any two towns."""
    last = town.SEEDS_A_SPLIT - 1
    ends = {
        (seed, split): (town.scene_seed(seed, split, 0), town.scene_seed(seed, split, last))
        for seed, split in product((0, 1, 2, 77), ("train", "val", "held_out"))
    }
    ordered = sorted(ends.values())
    assert all(low <= high for low, high in ordered)
    assert all(before[1] < after[0] for before, after in pairwise(ordered))
    with pytest.raises(DataError, match="unknown town split 'test'"):
        town.scene_seed(0, "test", 0)
    with pytest.raises(DataError, match="a town split holds scenes 0 to"):
        town.scene_seed(0, "train", last + 1)


def test_every_class_is_common_enough_to_be_learned() -> None:
    """Over some scenes each class has at least one pixel in fifty, and none more than half; most scenes have all."""
    labels = np.stack([town.draw(seed, 48, 64)[1] for seed in range(40)])
    shares = np.bincount(labels.ravel(), minlength=8) / labels.size
    assert shares.min() > 0.02
    assert shares.max() < 0.5
    assert np.median([len(np.unique(label)) for label in labels]) >= 7


def test_a_label_pixel_is_what_most_of_the_pixel_shows() -> None:
    """Of four sub-pixels the class with most of them wins; a tie goes to the first of the tied."""
    blocks = {(1, 1, 1, 2): 1, (2, 1, 1, 1): 1, (1, 2, 3, 3): 3, (1, 2, 1, 3): 1, (1, 2, 2, 3): 2, (4, 2, 3, 1): 4}
    for (a, b, c, d), expected in blocks.items():
        assert majority(np.array([[a, b], [c, d]], np.uint8)).tolist() == [[expected]]


def test_label_and_photo_come_from_one_drawing() -> None:
    """A polygon of a paint covers the same sub-pixels in colours and in classes: they are one index image."""
    camera = Camera(40, 60, focal=50.0, x=0.0, height_m=1.5)
    canvas = Canvas(camera, (0, 0, 0), 0.0)
    canvas.start(np.full((40, 60), canvas.paint((9, 9, 9), 2), np.int32))
    canvas.polygon([(-1, 0, 5), (1, 0, 5), (1, 2, 5), (-1, 2, 5)], canvas.paint((200, 0, 0), 6))
    index, _ = canvas.images()
    classes, red = np.array(canvas.classes)[index], np.array(canvas.colors)[index][..., 0]
    assert np.array_equal(classes == 6, red == 200)
    # 2 m by 2 m at 5 m through a 50-pixel lens: 20 by 20 pixels, its foot 15 pixels below the horizon.
    rows, columns = np.nonzero(classes == 6)
    assert (rows.min(), rows.max()) == (15, 35)
    assert (columns.min(), columns.max()) == (20, 40)


def test_what_is_behind_the_lens_is_cut_off() -> None:
    """A facade that begins behind the camera is drawn from where it comes into view."""
    camera = Camera(40, 60, focal=50.0, x=0.0, height_m=1.5)
    canvas = Canvas(camera, (0, 0, 0), 0.0)
    canvas.start(np.full((40, 60), canvas.paint((9, 9, 9), 2), np.int32))
    wall = canvas.paint((9, 9, 9), 1)
    canvas.polygon([(3, 0, -10), (3, 0, 10), (3, 4, 10), (3, 4, -10)], wall)
    index, _ = canvas.images()
    columns = np.nonzero((index == wall).any(axis=0))[0]
    assert (columns.min(), columns.max()) == (45, 59)  # 3 m aside at 10 m: 15 pixels right of the middle
    canvas.polygon([(-3, 0, -10), (-3, 0, -1), (-3, 4, -1), (-3, 4, -10)], wall)
    assert np.array_equal(canvas.images()[0], index)


def test_ground_points_project_where_the_camera_says() -> None:
    """What `ground` says of a pixel and where a polygon there is drawn agree, also for a turned and leaning camera."""
    camera = Camera(60, 80, focal=70.0, x=0.4, height_m=1.8, yaw=0.2, pitch=0.15, roll=0.04)
    x, z, rise = camera.ground()
    for row, column in ((45, 12), (50, 40), (58, 71)):
        assert rise[row, column] < 0
        there = camera.pixels(camera.view(np.array([x[row, column], 0.0, z[row, column]])))
        assert there == pytest.approx([column + 0.5, row + 0.5], abs=1e-3)


def test_the_layout_draws_what_it_lists() -> None:
    """Items of the layout `town` are scenes of disjoint seeds, encoded so that the label survives exactly."""
    listing = LAYOUTS["town"](None, LayoutOptions(seed=3, train_scenes=4, val_scenes=2, size=(48, 64)))
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 4, "val": 2}
    assert listing.settings["drawing"] == town.VERSION
    sample = listing.read(listing.splits["val"][1], listing.classes, listing.ignore_index)
    image, label = town.draw(town.scene_seed(3, "val", 1), 48, 64)
    assert np.array_equal(decode_label(sample.label), label)
    assert np.abs(decode_image(sample.image).astype(int) - image).mean() < 4
    assert (sample.name, sample.height, sample.width) == ("town-val-000001", 48, 64)


def test_bad_town_options_are_refused() -> None:
    """A source, a size too small, a split without scenes: each says what to give."""
    for source, options, message in (
        ("photos", LayoutOptions(), "takes no source, got photos"),
        (None, LayoutOptions(size=(16, 64)), "at least 32×32 pixels, got 16×64"),
        (None, LayoutOptions(val_scenes=0), "the split 'val' needs at least one scene, got 0"),
    ):
        with pytest.raises(DataError, match=message):
            LAYOUTS["town"](source, options)


def test_colour_and_place_do_not_tell_the_class() -> None:
    """A classifier that sees single pixels stays below the limit (a small fit; `make bench` measures the full one)."""
    miou = pixel_classifier_miou(seed=0, train_scenes=24, val_scenes=8, height=48, width=64, pixels=6000)
    assert 0.1 < miou <= LIMIT
