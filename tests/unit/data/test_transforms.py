"""Augmentation of photograph and label together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray.config import AugmentSettings
from sceneray.data import order
from sceneray.data.transforms import PAD_COLOUR, augment
from sceneray.errors import ConfigError

PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0}


def painted(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture whose red value is its label: coarse squares of ten classes."""
    rows, columns = np.indices((height, width)) // 12
    label = ((rows * 3 + columns) % 10).astype(np.uint8)
    image = np.stack([label * 20, 255 - label * 20, label * 0], axis=2).astype(np.uint8)
    return image, label


@given(
    st.integers(8, 90), st.integers(8, 90), st.integers(8, 64), st.integers(8, 64), st.integers(0, 1000),
    st.floats(0.3, 1.0), st.floats(1.0, 2.5),
)  # fmt: skip
def test_label_stays_on_its_pixels(
    height: int, width: int, crop_h: int, crop_w: int, position: int, low: float, high: float
) -> None:
    """Whatever is drawn, a labelled pixel away from edges still has the colour of its class, and padding is ignored."""
    settings = AugmentSettings(crop=(crop_h, crop_w), scale=(low, high), **PLAIN)
    image, label = augment(*painted(height, width), settings, order.augmentation_rng(0, position))
    assert image.shape == (crop_h, crop_w, 3)
    assert label.shape == (crop_h, crop_w)
    assert (image[label == 255] == PAD_COLOUR).all()
    inside = _far_from_edges(label)
    assert (np.abs(image[..., 0].astype(int) - label * 20.0)[inside] <= 2).all()


def _far_from_edges(label: np.ndarray) -> np.ndarray:
    """Pixels whose 9×9 neighbourhood has one label: resampling mixes no colours there."""
    padded = np.pad(label, 4, constant_values=254)  # past the cut another class may begin
    windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9))
    same: np.ndarray = (windows == label[..., None, None]).all(axis=(2, 3)) & (label != 255)
    return same


def test_flip_mirrors_both() -> None:
    """With certainty of a flip and no other change, image and label are the mirrored ones."""
    settings = AugmentSettings(crop=(24, 36), scale=(1, 1), flip=1.0, **PLAIN)
    image, label = painted(24, 36)
    got_image, got_label = augment(image, label, settings, order.augmentation_rng(0, 0))
    assert np.array_equal(got_image, image[:, ::-1])
    assert np.array_equal(got_label, label[:, ::-1])


def test_same_position_same_sample() -> None:
    """A sample depends on (seed, position) alone; its neighbours look different."""
    settings = AugmentSettings(crop=(32, 32))
    image, label = painted(60, 60)
    first, again, other = (augment(image, label, settings, order.augmentation_rng(7, p))[0] for p in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_colour_jitter_leaves_the_label_alone() -> None:
    """Colours change, labels do not."""
    settings = AugmentSettings(crop=(24, 36), scale=(1, 1), flip=0, brightness=0.5)
    image, label = painted(24, 36)
    got_image, got_label = augment(image, label, settings, order.augmentation_rng(0, 1))
    assert not np.array_equal(got_image, image)
    assert np.array_equal(got_label, label)


def test_transforms_that_miss_the_crop_are_refused() -> None:
    """A list of transforms that does not end at the crop's size is a clear error, not a crash while collating."""
    settings = AugmentSettings(crop=(10, 10), transforms=("flip",))
    with pytest.raises(ConfigError, match="not at the crop 10×10"):
        augment(*painted(24, 36), settings, order.augmentation_rng(0, 0))
