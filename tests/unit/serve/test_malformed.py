"""Hundreds of malformed uploads to the real app and a real model: each is refused rightly, none hurts the next one."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from sceneray.data import town
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Limits
from serve.schemas import ErrorBody
from serve.segmenter import Segmenter
from tests.bundles import write_bundle
from tests.unit.serve.uploads import Client, encoded, png_header

LIMITS = Limits(max_items=4, max_cost=400_000, max_queued_cost=800_000, max_wait_s=0.0)
UPLOADS = UploadLimits(max_bytes=200_000, max_pixels=100_000, max_side=1000)
DEADLINE_S = 30.0  # an input that hangs is a 504, which none here deserves
MOST_GROWTH = 100 * 2**20
SEED = 4
PHOTO = Image.fromarray(town.draw(1, 48, 64)[0])
GOOD = {
    "jpeg": encoded(PHOTO, "JPEG", quality=90),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "png": encoded(PHOTO, "PNG"),
    "webp": encoded(PHOTO, "WEBP", quality=80),
    "lossless webp": encoded(PHOTO, "WEBP", lossless=True),
}
Case = tuple[str, dict[str, object]]  # what it is, and the request's arguments


def raw(name: str, body: bytes, kind: str = "image/jpeg") -> Case:
    """An upload as the whole body."""
    return name, {"content": body, "headers": {"Content-Type": kind}}


def form(name: str, body: bytes) -> Case:
    """The same in the form field `image`."""
    return name, {"files": {"image": ("photo.jpg", body, "image/jpeg")}}


def damaged_files(rng: random.Random) -> Iterator[Case]:
    """Real files cut short anywhere, with bits turned, with bytes put in or taken out."""
    for name, data in GOOD.items():
        for index in range(25):
            yield raw(f"{name} cut", data[: rng.randrange(1, len(data))])
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 1, 3, 30))):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield (form if index % 2 else raw)(f"{name} bits turned", bytes(flipped))
            head = bytearray(data)
            head[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
            yield raw(f"{name} bit turned in the header", bytes(head))
            at = rng.randrange(len(data))
            yield raw(f"{name} bytes put in", data[:at] + rng.randbytes(8) + data[at:])


def wrong_headers(rng: random.Random) -> Iterator[Case]:
    """Files that begin as an image and are none, and files that claim what they do not hold."""
    for magic in (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xda", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBPVP8X"):
        for size in (0, 1, 7, 30, 500):
            yield raw("magic bytes and noise", magic + rng.randbytes(size))
    for side in ((50_000, 50_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 10), (1001, 5)):
        yield raw("png that claims a size", png_header(*side), "image/png")
        yield raw("png that claims a size, 1 kB", png_header(*side) + bytes(1000), "image/png")
    for data in GOOD.values():
        yield raw("two files in one", data + data)
        yield raw("leading zeros", bytes(16) + data)
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM"):
        yield raw(f"a sound {kind}", encoded(PHOTO, kind))


def bombs() -> Iterator[Case]:
    """Small files with a lot in them: pixels, text, colour profiles, scans, frames."""
    yield raw("1-bit bomb", encoded(Image.new("1", (20_000, 20_000)), "PNG", optimize=True), "image/png")
    yield raw("1-bit as large as may be", encoded(Image.new("1", (316, 316)), "PNG"), "image/png")
    for kind, body in ((b"zTXt", b"x\0\0"), (b"iCCP", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
        chunk = body + zlib.compress(bytes(50 * 2**20), 9)
        packed = struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
        yield raw(f"png with 50 MB of {kind.decode()}", GOOD["png"][:33] + packed + GOOD["png"][33:], "image/png")
    data = GOOD["progressive"]
    last = data[data.rindex(b"\xff\xda") : -2]
    yield raw("jpeg of a thousand scans", (data[:-2] + last * 1000 + data[-2:])[: UPLOADS.max_bytes])
    frames = [Image.new("RGB", (64, 64), (n, n, n)) for n in range(200)]
    yield raw("webp of 200 frames", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    yield raw("png of 200 frames", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    exif = Image.Exif()
    exif[0x0112] = 99
    yield raw("an orientation that is none", encoded(PHOTO, "JPEG", exif=exif))
    yield raw("exif that is noise", encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40))


def polyglots() -> Iterator[Case]:
    """An image that is a page, an archive, a script or a program too."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "x" * 100)
    page = b"<!doctype html><script>alert(1)</script>"
    for name, data in GOOD.items():
        yield raw(f"{name} and a page", data + page)
        yield raw(f"{name} and an archive", data + archive.getvalue())
    yield raw("a page and a png", page + GOOD["png"])
    yield raw("gif and jpeg", b"GIF89a" + GOOD["jpeg"])
    for text in (page, b"#!/bin/sh\n", b"MZ" + bytes(200), b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        yield raw("no image at all", text)
        yield form("no image at all, in a form", text)
    for url in (b"http://169.254.169.254/latest/meta-data/", b"file:///etc/passwd", b"s3://bucket/key"):
        yield raw("an address", url)


def wrong_requests(rng: random.Random) -> Iterator[Case]:
    """Wrong types, fields, lengths and multipart framing around a sound photograph."""
    good = GOOD["jpeg"]
    for kind in ("text/html", "application/json", "application/x-www-form-urlencoded", "multipart/mixed; boundary=b"):
        yield raw("wrong type", good, kind)
    for kind in ("", "image/", "image/svg+xml", ";;;", "\x7f", "multipart/form-data", "multipart/form-data; boundary="):
        yield raw("odd type", good, kind)
    yield raw("huge boundary", good, "multipart/form-data; boundary=" + "b" * 60_000)
    yield raw("boundary of odd characters", good, 'multipart/form-data; boundary="\\"; x"')
    yield raw("empty", b"")
    yield raw("too large", rng.randbytes(UPLOADS.max_bytes + 1))
    yield form("empty file", b"")
    yield "two fields named image", {"files": [("image", ("a", good)), ("image", ("b", b""))]}
    yield "many files", {"files": [("image", (str(n), good)) for n in range(40)]}
    yield "many fields", {"data": {str(n): "x" for n in range(200)}, "files": {"image": ("a", good)}}
    yield "image as text", {"data": {"image": "x" * 1000}, "files": {"other": ("a", good)}}
    yield "a field of 100 kB", {"data": {"note": "x" * 100_000}, "files": {"image": ("a", good)}}
    yield "path as a name", {"files": {"image": ("../../etc/passwd\0.png", good)}}
    whole = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + good + b"\r\n--b--\r\n"
    for at in sorted(rng.sample(range(len(whole)), 40)):
        yield raw("form cut", whole[:at], "multipart/form-data; boundary=b")
    for _ in range(40):
        broken = bytearray(whole)
        broken[rng.randrange(80)] ^= 1 << rng.randrange(8)
        yield raw("form with a bit turned", bytes(broken), "multipart/form-data; boundary=b")
    for length in ("-1", "x", "99999999999999999999", "1e3", "²"):
        headers = {"Content-Type": "image/jpeg", "Content-Length": length.encode("latin-1")}
        yield "wrong length", {"content": good, "headers": headers}
    for accept in ("image/", ",", "x" * 5000, "image/png;q=nan", "*/*;q=1;q=2;;"):
        yield "odd accept", {"content": good, "headers": {"Content-Type": "image/jpeg", "Accept": accept}}
    for query in ("view=", "view=mask&view=overlay", "format=%00", "=&&=", "classes=" + "x," * 2000, "url=http://x/"):
        yield "odd query", {"content": good, "headers": {"Content-Type": "image/jpeg"}, "params": query}


def noise(rng: random.Random) -> Iterator[Case]:
    """Random bytes, raw and in forms."""
    for _ in range(40):
        yield raw("noise", rng.randbytes(rng.choice((1, 10, 100, 5000))))
        yield form("noise in a form", rng.randbytes(200))


def cases() -> list[Case]:
    """All of them, always the same."""
    rng = random.Random(SEED)
    found = [*damaged_files(rng), *wrong_headers(rng), *bombs(), *polyglots(), *wrong_requests(rng), *noise(rng)]
    assert len(found) >= 500
    return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of the app over the real segmenter."""
    segmenter = Segmenter.load(write_bundle(str(tmp_path_factory.mktemp("bundle"))), LIMITS, "cpu")
    with Client(create_app(segmenter, ApiSettings(UPLOADS, deadline_s=DEADLINE_S))) as client:
        yield client


def assert_right(name: str, answer: httpx.Response) -> None:
    """A mask, or an error of the caller's in the shape of every error."""
    if answer.status_code == 200:
        assert answer.headers["x-model-version"], name
        return
    assert answer.status_code in (400, 406, 413, 415, 422), (name, answer.status_code, answer.text[:300])
    body = ErrorBody.model_validate_json(answer.content)
    assert body.error, name
    assert set(answer.json()) == {"error", "error_type", "detail", "request_id"}, name


# Starlette leaves the temporary file of a form that breaks off to the garbage collector, which closes it.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile")
def test_hundreds_of_malformed_uploads(client: Client) -> None:
    """Each is answered 200 or with the right 4xx, none hangs, memory stays, sound photographs pass after all."""
    every = cases()
    before, counts = 0, Counter()
    for number, (name, request) in enumerate(every):
        if number == len(every) // 10:  # allocators and caches have grown to their size by then
            before = psutil.Process().memory_info().rss
        answer = client.post("/v1/segment", **request)
        assert_right(name, answer)
        counts[answer.status_code] += 1
        if number % 50 == 0:
            assert client.post("/v1/segment", content=GOOD["png"]).status_code == 200
    growth = psutil.Process().memory_info().rss - before
    print(f"\n{len(every)} malformed uploads: {dict(sorted(counts.items()))}; memory grew by {growth / 2**20:.0f} MiB")
    assert growth < MOST_GROWTH
    assert client.post("/v1/segment", content=GOOD["jpeg"]).status_code == 200
    assert counts[200] < len(every) / 2
    assert min(counts[status] for status in (400, 413, 415, 422)) > 0


def test_what_is_sound_is_answered_and_what_is_a_bomb_is_not(client: Client) -> None:
    """So that the test above could not pass by refusing, or taking, everything."""
    for data in GOOD.values():
        assert client.post("/v1/segment", content=data).status_code == 200
    statuses = {name: client.post("/v1/segment", **request).status_code for name, request in bombs()}
    assert statuses["1-bit bomb"] == 413
    assert statuses["1-bit as large as may be"] == 200
    assert statuses["jpeg of a thousand scans"] == 422
    assert statuses["webp of 200 frames"] == statuses["png of 200 frames"] == 200
    assert statuses["an orientation that is none"] == 200


# Pictures as people have them: (mode, format).
KINDS = [("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")]


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_every_kind_of_picture_is_answered(client: Client, mode: str, kind: str) -> None:
    """Grey, alpha, palette, one and 16 bits, CMYK: each gets a mask of its size."""
    is_deep = mode == "I;16"
    picture = Image.fromarray(np.full((48, 64), 40_000, np.uint16)) if is_deep else PHOTO.convert(mode)
    answer = client.post("/v1/segment", content=encoded(picture, kind))
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as mask:
        assert mask.size == (64, 48)
