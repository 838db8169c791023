"""What the first bytes of an upload tell, beside what Pillow finds in the whole of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.image_header import JPEG_SEGMENTS, claimed_pixels
from tests.unit.serve.uploads import encoded, png_header

SIDES = st.integers(1, 70)
STARTS = (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8 ")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "with a profile, a comment and Exif": ("JPEG", {"icc_profile": bytes(150_000), "comment": b"x" * 999}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("name", FORMS)
@given(width=SIDES, height=SIDES)
def test_the_claim_is_what_pillow_reads(name: str, width: int, height: int) -> None:
    """Of any size, and whatever stands before the frame header."""
    form, options = FORMS[name]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: the number of pixels is the same
    data = encoded(Image.new("RGB", (width, height)), form, **options, **({"exif": exif} if "Exif" in name else {}))
    with Image.open(io.BytesIO(data)) as image:
        assert claimed_pixels(data) == image.width * image.height == width * height


@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8 "]),
)
def test_any_bytes_are_a_number_or_nothing(data: bytes, start: bytes) -> None:
    """Nothing is raised, whatever came."""
    claimed = claimed_pixels(start + data)
    assert claimed is None or claimed >= 0


def test_only_the_first_segments_are_looked_at() -> None:
    """A JPEG of a hundred thousand empty segments is not known at once; a PNG's claim is taken as it stands."""
    segment = b"\xff\xe0\x00\x02"
    sound = encoded(Image.new("RGB", (31, 17)), "JPEG")
    assert claimed_pixels(sound[:2] + segment * 20 + sound[2:]) == 31 * 17
    assert claimed_pixels(sound[:2] + segment * JPEG_SEGMENTS + sound[2:]) is None
    assert claimed_pixels(sound[:2] + segment * 100_000 + sound[2:]) is None
    assert claimed_pixels(png_header(50_000, 50_000)) == 50_000**2
