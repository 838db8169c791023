"""Windows over large images: their places, and what becomes of overlapping answers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sceneray import windows

sides = st.integers(8, 64)


@given(length=st.integers(1, 400), side=sides)
def test_windows_cover_every_pixel_and_stay_inside(length: int, side: int) -> None:
    """Every pixel lies in a window, windows lie in the image, and neighbours are at most two thirds of a side apart."""
    found = windows.starts(length, side)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[-1] == max(0, length - side)
    assert all(later - earlier <= -(-2 * side // 3) for earlier, later in pairwise(found))
    if length >= side:
        assert {pixel for start in found for pixel in range(start, start + side)} == set(range(length))


@given(height=st.integers(8, 60), width=st.integers(8, 60), side=st.integers(8, 24), seed=st.integers(0, 99))
def test_bands_are_the_sum_of_all_windows(height: int, width: int, side: int, seed: int) -> None:
    """Given back in bands, the answer is that of adding all windows up in one large array; memory is one row's."""
    height, width = max(height, side), max(width, side)
    draw = torch.Generator().manual_seed(seed)
    whole = torch.zeros(3, height, width)
    bands = windows.Bands(width, side, confidence=True)
    parts = []
    for top in windows.starts(height, side):
        for left in windows.starts(width, side):
            probabilities = torch.rand(3, side, side, generator=draw).softmax(dim=0)
            whole[:, top : top + side, left : left + side] += probabilities
            parts += bands.add(top, left, probabilities)
            assert bands._sum is not None
            assert bands._sum.shape == (3, side, width)
    parts.append(bands.rest())
    mask = np.concatenate([part for part, _ in parts])
    sure = np.concatenate([part for _, part in parts if part is not None])
    assert np.array_equal(mask, whole.argmax(dim=0).numpy().astype(np.uint8))
    expected = (whole.amax(dim=0) / whole.sum(dim=0) * 255).round().numpy()
    assert np.abs(sure.astype(float) - expected).max() <= 1


def test_a_small_image_is_filled_up_with_the_mean_colour() -> None:
    """Below and to the right, and only as far as the window needs; an image that is large enough is left alone."""
    image = np.full((5, 40, 3), 7, np.uint8)
    grown = windows.padded(image, 16)
    assert grown.shape == (16, 40, 3)
    assert np.array_equal(grown[:5], image)
    assert grown[5:].reshape(-1, 3).tolist() == [[124, 116, 104]] * (11 * 40)
    large = np.zeros((16, 16, 3), np.uint8)
    assert windows.padded(large, 16) is large
