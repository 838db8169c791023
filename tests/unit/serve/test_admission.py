"""What may come in: decided from bytes counted and headers read, before anything is decoded."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import Request

from serve.admission import BodyGate, PixelGate, Refused, UploadLimits, check_header, decode, read_upload
from serve.batching import Overloaded
from serve.image_header import webp_size
from tests.unit.serve.uploads import encoded, png_header

LIMITS = UploadLimits(max_bytes=5000, max_pixels=10_000, max_side=400)


def request(chunks: list[bytes], **headers: str) -> tuple[Request, list[bytes]]:
    """A POST whose body comes in `chunks`, and the list of those not yet taken."""
    waiting = list(chunks)

    async def receive() -> dict[str, Any]:
        body = waiting.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive), waiting


def refusal_of(data: bytes) -> int | None:
    """The status with which header or decoder refuse `data`; None where they take it."""
    try:
        check_header(data, LIMITS)
        decode(data)
    except Refused as refused:
        return refused.status
    return None


def test_a_raw_body_is_the_image() -> None:
    """A body in pieces, of an image type, an octet stream or no type, is put together as it came."""
    for kind in ({"content_type": "image/jpeg"}, {"content_type": "application/octet-stream"}, {}):
        upload, _ = request([b"ab", b"c"], **kind)
        assert asyncio.run(read_upload(upload, LIMITS)) == b"abc"


def test_a_body_that_declares_too_much_is_not_read() -> None:
    """A content-length above the limit is refused without taking a byte."""
    upload, waiting = request([b"x"], content_length="5001")
    with pytest.raises(Refused) as refused:
        asyncio.run(read_upload(upload, LIMITS))
    assert refused.value.status == 413
    assert waiting == [b"x"]


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_bytes_are_counted_whatever_the_headers_claim(sizes: list[int]) -> None:
    """Up to the limit a body without a declared length is read whole; reading stops at the first piece above it."""
    upload, waiting = request([b"x" * size for size in sizes])
    total = sum(sizes)
    if 0 < total <= LIMITS.max_bytes:
        assert len(asyncio.run(read_upload(upload, LIMITS))) == total
        return
    with pytest.raises(Refused) as refused:
        asyncio.run(read_upload(upload, LIMITS))
    assert refused.value.status == (422 if total == 0 else 413)
    read = sum(sizes[: len(sizes) - len(waiting)])
    assert read <= LIMITS.max_bytes + 3000


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused_with_the_fix(kind: str) -> None:
    """What is declared to be no image is a 415 that shows how to send one."""
    upload, _ = request([b"x"], content_type=kind)
    with pytest.raises(Refused, match=r"-F image=@photo\.jpg") as refused:
        asyncio.run(read_upload(upload, LIMITS))
    assert refused.value.status == 415


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_header_tells_the_size(form: str) -> None:
    """Height and width come from the header of the three formats."""
    assert check_header(encoded(Image.new("RGB", (30, 20)), form), LIMITS) == (20, 30)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (12_000, 9_000), (401, 3), (3, 401), (101, 100)])
def test_a_header_that_asks_for_too_much_is_refused_before_decoding(width: int, height: int) -> None:
    """Too many pixels or too long a side, up to sizes that Pillow itself refuses, are a 413."""
    with pytest.raises(Refused) as refused:
        check_header(png_header(width, height), LIMITS)
    assert (refused.value.status, refused.value.error_type) == (413, "image_too_large")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_not_even_tried(form: str) -> None:
    """Formats that nobody needs here are refused by their header, however sound the file."""
    with pytest.raises(Refused) as refused:
        check_header(encoded(Image.new("RGB", (16, 16)), form), LIMITS)
    assert refused.value.status == 415


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(form: str) -> None:
    """As a viewer opens it: the first frame is the picture."""
    frames = [Image.new("RGB", (16, 16), (50 + 50 * n, 0, 0)) for n in range(3)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert check_header(data, LIMITS) == (16, 16)
    assert decode(data)[0, 0].tolist() == pytest.approx([50, 0, 0], abs=3)


def webp_canvas(width: int, height: int) -> bytes:
    """A WebP of a few bytes whose first chunk claims a canvas."""
    body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + len(body).to_bytes(4, "little") + body
    return b"RIFF" + len(chunks).to_bytes(4, "little") + chunks


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_is_measured_without_its_decoder(lossless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size limits of a WebP hold before Pillow opens it, which allocates the whole canvas."""
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    for large in (webp_canvas(16_383, 16_383), encoded(Image.new("RGB", (401, 3)), "WEBP", lossless=lossless)):
        with pytest.raises(Refused) as refused:
            check_header(large, LIMITS)
        assert refused.value.error_type == "image_too_large"
    assert opened == []
    small = encoded(Image.new("RGB", (31, 17)), "WEBP", lossless=lossless)
    assert webp_size(small) == (31, 17)
    assert check_header(small, LIMITS) == (17, 31)


def test_the_magic_bytes_decide_and_no_other_reader_is_tried() -> None:
    """A GIF behind a PNG's first bytes is a damaged PNG, never a GIF; the error tells what came."""
    gif = encoded(Image.new("RGB", (16, 16)), "GIF")
    with pytest.raises(Refused) as refused:
        check_header(gif, LIMITS)
    assert refused.value.detail == {"formats": ["JPEG", "PNG", "WEBP"], "first_bytes": gif[:8].hex()}
    with pytest.raises(Refused) as refused:
        check_header(b"\x89PNG\r\n\x1a\n" + gif, LIMITS)
    assert (refused.value.status, refused.value.error_type) == (422, "broken_image")


def test_a_jpeg_of_countless_scans_is_refused_unread() -> None:
    """A progressive file whose every scan is a few bytes would keep a decoder busy for hours: a 422 that counts."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encoded(photo, "JPEG", progressive=True)
    assert check_header(data, LIMITS) == (40, 40)
    start, end = data.rindex(b"\xff\xda"), len(data) - 2
    bomb = data[:end] + data[start:end] * 100 + data[end:]
    with pytest.raises(Refused, match="100 scans") as refused:
        check_header(bomb, LIMITS)
    assert refused.value.error_type == "too_many_scans"


def test_a_phones_jpeg_with_previews_is_a_photograph() -> None:
    """An MPO (a JPEG with further pictures behind the first) passes, and its first picture is the one decoded."""
    first, second = Image.new("RGB", (32, 16), (200, 0, 0)), Image.new("RGB", (32, 16), (0, 0, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert check_header(data, LIMITS) == (16, 32)
    assert decode(data)[0, 0].tolist() == pytest.approx([200, 0, 0], abs=3)


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF"]))
def test_any_bytes_are_answered_with_a_refusal(data: bytes, start: bytes) -> None:
    """Whatever the bytes, header and decoder either accept them or refuse with a 4xx; nothing else is raised."""
    assert refusal_of(start + data) in (None, 413, 415, 422)


@given(cut=st.integers(1, 600))
def test_a_truncated_photograph_is_refused(cut: int) -> None:
    """A JPEG that breaks off anywhere is refused at its header or in its pixels, never answered with grey."""
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)), "JPEG")
    assert len(data) > 600
    assert refusal_of(data[:cut]) in (415, 422)


# (Pillow mode, format) of pictures that are no plain RGB.
MODES = [
    *((mode, "PNG") for mode in ("L", "1", "P", "RGBA", "LA", "I;16")),
    *(("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")),
]


@pytest.mark.parametrize(("mode", "form"), MODES)
def test_every_kind_of_photograph_decodes_to_rgb(mode: str, form: str) -> None:
    """Grey, one-bit, palette, alpha, CMYK and 16-bit pictures become uint8 RGB of about the same brightness."""
    if mode == "I;16":
        picture = Image.fromarray(np.full((20, 30), 200 * 257, np.uint16))
    else:
        picture = Image.new("RGB", (30, 20), (200, 200, 200))
        picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    data = encoded(picture, form)
    assert check_header(data, LIMITS) == (20, 30)
    image = decode(data)
    assert (image.shape, image.dtype) == ((20, 30, 3), np.uint8)
    if mode != "1":
        assert np.abs(image.astype(int) - 200).max() <= 8


def test_exif_turns_the_photograph_upright() -> None:
    """A picture stored lying on its side is decoded as people see it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the picture
    data = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    assert decode(data).shape == (30, 20, 3)


def test_a_refusal_survives_the_way_from_a_replica() -> None:
    """Ray carries exceptions between processes: status, type, headers and detail come through."""
    refused = Refused(413, "image_too_large", "rule, came, fix", {"Retry-After": "2"}, {"max_side": 8})
    copied = copy.copy(refused)
    assert (copied.status, copied.error_type, str(copied)) == (413, "image_too_large", "rule, came, fix")
    assert (copied.headers, copied.detail) == ({"Retry-After": "2"}, {"max_side": 8})


def test_the_gate_of_bodies_counts_bytes_in_and_out() -> None:
    """Past the bound no byte enters, what was refused takes no room, and what is given back makes some."""
    gate = BodyGate(100)
    gate.take(60)
    gate.take(40)
    with pytest.raises(Overloaded, match="uploads"):
        gate.take(1)
    gate.give(60)
    gate.take(60)
    assert gate.inside == 100


def test_the_gate_counts_pixels_in_and_out() -> None:
    """Past the bound nobody enters; who leaves, also by an error, makes room."""
    gate = PixelGate(100)

    def fails_inside() -> None:
        with gate.admit(60):
            raise ValueError("the model failed")

    with gate.admit(60), gate.admit(40), pytest.raises(Overloaded), gate.admit(1):
        pass
    with pytest.raises(ValueError, match="the model failed"):
        fails_inside()
    with gate.admit(100):
        pass


def test_the_gate_says_when_there_should_be_room() -> None:
    """From the speed at which pixels left: whole seconds, at least one, at most a minute; idle time does not count."""
    now = [0.0]
    gate = PixelGate(1000, lambda: now[0])
    assert gate.retry_after_s(10) == 1
    now[0] = 500.0  # nobody came
    with gate.admit(400):
        now[0] = 504.0  # 100 pixels a second
    with gate.admit(1000):
        assert gate.retry_after_s(500) == pytest.approx(5, abs=1)
        with pytest.raises(Overloaded) as refused, gate.admit(500):
            pass
        assert refused.value.retry_after_s == gate.retry_after_s(500)
        now[0] += 1000
        assert gate.retry_after_s(1000) == 60


@given(steps=st.lists(st.tuples(st.integers(1, 500), st.floats(0, 100)), max_size=20), more=st.integers(1, 2000))
def test_the_gates_advice_is_always_a_number_of_seconds(steps: list[tuple[int, float]], more: int) -> None:
    """Whatever came before, Retry-After is a whole number from 1 to 60."""
    now = [0.0]
    gate = PixelGate(500, lambda: now[0])
    for pixels, seconds in steps:
        with gate.admit(pixels):
            now[0] += seconds
            assert 1 <= gate.retry_after_s(more) <= 60
