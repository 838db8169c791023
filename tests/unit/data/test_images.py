"""Photos and labels as bytes: exact round trips, upright photos, ids and never colours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from sceneray.data import images
from sceneray.data.images import decode_image, decode_label, encode_jpeg, encode_label, stored_photo
from sceneray.errors import DataError

ORIENTATION = 0x0112


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """`image` in the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(height: int = 20, width: int = 30) -> Image.Image:
    """A photo whose corners differ: red above, blue below, brighter to the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = 200
    pixels[height // 2 :, :, 2] = 200
    pixels[:, :, 1] = np.linspace(0, 120, width).astype(np.uint8)
    return Image.fromarray(pixels)


def turned(form: str = "JPEG", orientation: int = 6) -> bytes:
    """A photo that was stored lying, with the EXIF tag that says how to hold it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo(), form, exif=exif, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}))


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24))))
def test_a_label_comes_back_exactly(label: np.ndarray) -> None:
    """Encoding and decoding a label changes no id, and the file is an 8-bit grey PNG."""
    data = encode_label(label)
    assert np.array_equal(decode_label(data), label)
    with Image.open(io.BytesIO(data)) as file:
        assert (file.format, file.mode) == ("PNG", "L")


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.binary(min_size=768, max_size=768)
)
def test_a_palette_never_changes_ids(label: np.ndarray, palette: bytes) -> None:
    """A palette label is its indices, whatever its colours."""
    image = Image.fromarray(label)
    image.putpalette(palette)
    assert np.array_equal(decode_label(encoded(image, "PNG")), label)


def test_labels_of_one_and_of_sixteen_bits_are_read() -> None:
    """A bilevel PNG holds 0 and 1; a 16-bit one is read as long as its ids fit."""
    ids = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    assert np.array_equal(decode_label(encoded(Image.fromarray(ids * 255).convert("1"), "PNG")), ids)
    assert np.array_equal(decode_label(encoded(Image.fromarray(ids.astype(np.uint16) * 7), "PNG")), ids * 7)
    with pytest.raises(DataError, match="ids from 300 to 300, but an id is a number from 0 to 255"):
        decode_label(encoded(Image.fromarray(np.full((2, 2), 300, np.uint16)), "PNG"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_label_in_colours_is_refused(mode: str) -> None:
    """A label with several values a pixel is no label; the message says what to do."""
    with pytest.raises(DataError, match=rf"mode {mode}.*turn its colours into ids"):
        decode_label(encoded(photo().convert(mode), "PNG"))


@pytest.mark.parametrize("label", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 1), np.uint8)])
def test_only_uint8_planes_are_encoded(label: np.ndarray) -> None:
    """Another type or shape would be written as something else than ids."""
    with pytest.raises(DataError, match="a label is uint8"):
        encode_label(label)


def test_photos_of_every_kind_become_rgb() -> None:
    """Grey, palette, transparent and CMYK photos decode to uint8 RGB of the same content."""
    truth = np.asarray(photo())
    for image, form in ((photo().convert("RGBA"), "PNG"), (photo(), "BMP"), (photo(), "TIFF"), (photo(), "PNG")):
        assert np.array_equal(decode_image(encoded(image, form)), truth)
    grey = decode_image(encoded(photo().convert("L"), "JPEG"))
    assert grey.shape == truth.shape
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert decode_image(encoded(photo().convert("CMYK"), "JPEG")).shape == truth.shape


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    """A 16-bit photo keeps its shades: half of the range is half of 255."""
    ramp = np.array([[0, 0x8000, 0xFFFF]], np.uint16)
    assert decode_image(encoded(Image.fromarray(ramp), "PNG"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_lies_over_white(mode: str) -> None:
    """What is transparent is white, half is half, and no hidden colour ever shows; by channel, palette or key."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :2] = (200, 0, 0, 0)
    pixels[:, 2:4] = (100, 100, 100, 128 if mode in ("RGBA", "LA") else 255)
    pixels[:, 4:] = (100, 100, 100, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        palette = Image.fromarray(np.repeat([[0, 0, 1, 1, 1, 1]], 4, axis=0).astype(np.uint8))
        palette.putpalette([200, 0, 0, 100, 100, 100])
        data = encoded(palette, "PNG", transparency=0)
    elif mode == "RGB":
        data = encoded(image.convert("RGB"), "PNG", transparency=(200, 0, 0))
    else:
        data = encoded(image.convert(mode), "PNG")
    row = decode_image(data)[0]
    assert row[0].tolist() == [255, 255, 255]
    assert row[5].tolist() == [100, 100, 100]
    assert abs(int(row[2, 0]) - (177 if mode in ("RGBA", "LA") else 100)) <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(form: str) -> None:
    """As a viewer opens it; also where an animated PNG has another picture for viewers that cannot play it."""
    frames = [Image.new("RGB", (16, 16), (80 * n, 0, 0)) for n in range(3)]
    lossless = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[1], form, save_all=True, append_images=[frames[2]], **lossless)
    assert decode_image(data)[0, 0].tolist() == [80, 0, 0]
    if form == "PNG":
        poster = encoded(frames[0], form, save_all=True, append_images=frames[1:], default_image=True)
        assert decode_image(poster)[0, 0].tolist() == [80, 0, 0]


def test_sixteen_bit_grey_is_turned_upright_too() -> None:
    """The EXIF orientation holds for pictures of 16 bits a pixel as for others."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(Image.fromarray(np.full((4, 6), 0x8000, np.uint16)), "PNG", exif=exif)
    decoded = decode_image(data)
    assert decoded.shape == (6, 4, 3)
    assert np.all(decoded == 128)


def test_a_lying_photo_is_turned_upright() -> None:
    """The EXIF orientation is applied when decoding."""
    upright = decode_image(turned())
    assert upright.shape == (30, 20, 3)
    # Turned clockwise: what was above (red) is now on the right.
    assert upright[5, 15, 0] > 150 > upright[5, 4, 0]


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 80}), ("PNG", {})])
def test_a_plain_photo_is_stored_byte_for_byte(form: str, options: dict[str, int]) -> None:
    """An upright RGB JPEG or PNG is not encoded again: nothing is lost."""
    data = encoded(photo(), form, **options)
    assert stored_photo(data) == (data, 20, 30)


@pytest.mark.parametrize(
    ("data", "form", "size"),
    [
        (turned("JPEG"), "JPEG", (30, 20)),
        (turned("PNG"), "PNG", (30, 20)),
        (encoded(photo().convert("L"), "JPEG"), "JPEG", (20, 30)),
        (encoded(photo().convert("RGBA"), "PNG"), "PNG", (20, 30)),
        (encoded(photo(), "BMP"), "PNG", (20, 30)),
    ],
)
def test_any_other_photo_is_stored_as_upright_rgb(data: bytes, form: str, size: tuple[int, int]) -> None:
    """What a store keeps is an upright RGB JPEG or PNG of the size it says, and looks as the original decodes."""
    kept, height, width = stored_photo(data)
    assert (height, width) == size
    with Image.open(io.BytesIO(kept)) as image:
        assert (image.format, image.mode) == (form, "RGB")
        assert image.getexif().get(ORIENTATION, 1) == 1
    difference = np.abs(decode_image(kept).astype(int) - decode_image(data).astype(int))
    assert difference.max() <= (0 if form == "PNG" else 24)


@pytest.mark.parametrize("read", [decode_image, stored_photo])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "PCX"])
def test_a_broken_photo_is_a_sentence(read, kind: str) -> None:
    """Truncated, foreign and empty files are DataErrors that say so."""
    whole = encoded(photo(200, 300), "JPEG")
    data = {
        "truncated": whole[: len(whole) // 2],
        "text": b"no photograph",
        "empty": b"",
        "PCX": encoded(photo(), "PCX"),
    }[kind]
    with pytest.raises(DataError, match=r"the photo cannot be read .*replace it"):
        read(data)


def test_a_huge_picture_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header's size decides; the pixels are not touched."""
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(DataError, match="30 × 20 pixels; at most 599"):
        decode_image(encoded(photo(), "PNG")[:60])


def test_jpeg_keeps_colour_edges() -> None:
    """Town's photos are written with full colour resolution, so that a thin thing keeps its colour."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 7] = (255, 0, 0)
    decoded = decode_image(encode_jpeg(pixels, 95))
    assert decoded[8, 7, 0] > 200
    assert decoded[8, 9, 0] < 60
