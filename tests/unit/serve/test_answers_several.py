"""Several images in one request: each has the answer, or the error, that it would have had alone."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sceneray.masks import Photo
from serve.answer_several import file_name
from serve.answers import FORMATS
from serve.batching import Overloaded
from serve.schemas import Ask, ImageBody, Segmented
from serve.uploads import MAX_IMAGES
from tests.unit.serve.reader import (
    UPLOADS,
    Reader,
    ask,
    ask_several,
    blocks,
    client_of,
    photo,
)
from tests.unit.serve.uploads import Client, encoded


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of the app over the reading model."""
    with client_of(Reader()) as client:
        yield client


def test_several_images_have_one_answer_each(client: Client) -> None:
    """Repeating the field makes an array of what each image is answered alone, in order, whatever their shapes."""
    masks = [blocks([0, 1]), blocks([2], [2]), blocks([1])]
    answer = ask_several(client, *((f"{n}.png", photo(mask)) for n, mask in enumerate(masks)), format="json")
    items = [ImageBody(**item) for item in answer.json()]
    assert [item.name for item in items] == ["0.png", "1.png", "2.png"]
    assert [item.status for item in items] == [200, 200, 200]
    assert [(item.height, item.width) for item in items] == [mask.shape for mask in masks]
    alone = [ask(client, photo(mask), format="json").json() for mask in masks]
    assert [item["answer"] for item in answer.json()] == alone
    assert answer.headers["x-model-version"] == "2"


@pytest.mark.parametrize("form", ["hf", "json", "png", "raw"])
def test_a_bad_image_does_not_fail_the_others(client: Client, form: str) -> None:
    """Each bad file has the error in its place that it would have had alone, under the request's id."""
    good = photo(blocks([0, 1]))
    bad = {"broken.png": (good[: len(good) // 2], 422), "notes.txt": (b"no image", 415), "empty.png": (b"", 422)}
    files = [("a.png", good), *((name, data) for name, (data, _) in bad.items()), ("b.png", good)]
    answer = ask_several(client, *files, format=form)
    assert answer.status_code == 200
    if FORMATS[form].media_types[0] == "application/json":
        items = answer.json()
    else:
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None
            items = json.loads(archive.read("manifest.json"))
            assert archive.namelist() == [item["file"] for item in items if "file" in item] + ["manifest.json"]
            assert archive.read(items[0]["file"]) == ask(client, good, format=form).content
    assert [item["status"] for item in items] == [200, *(status for _, status in bad.values()), 200]
    for item, (data, status) in zip(items[1:-1], bad.values(), strict=True):
        alone = ask(client, data, format=form)
        assert alone.status_code == status
        error = ImageBody(**item).error
        assert error is not None
        assert (error.error_type, error.error) == (alone.json()["error_type"], alone.json()["error"])
        assert error.request_id == answer.headers["x-request-id"]


def test_a_request_is_bounded_however_many_images_it_has(client: Client) -> None:
    """The images' pixels in all are bounded as one image's, by their headers; their bytes and number too."""
    image = photo(np.zeros((50, 50), np.uint8))
    assert ask_several(client, *[("a.png", image)] * 2).status_code == 200
    answer = ask_several(client, *[("a.png", image)] * 3)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "images_too_large")
    assert ask_several(client, *[("a.png", image)] * (MAX_IMAGES + 1)).status_code == 400
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    heavy = encoded(Image.fromarray(noise), "PNG")
    assert len(heavy) < UPLOADS.max_bytes < 5 * len(heavy)
    assert ask_several(client, *[("a.png", heavy)] * 5).json()["error_type"] == "body_too_large"


def test_a_fault_of_the_request_is_no_images(client: Client) -> None:
    """An unknown class, and a model that is overloaded, refuse the request as a whole."""
    files = [("a.png", photo(blocks([0]))), ("b.png", photo(blocks([1])))]
    assert ask_several(client, *files, classes="sky", format="json").json()["error_type"] == "unknown_class"

    class Full(Reader):
        async def segment(self, image: Photo, ask: Ask) -> Segmented:
            if image[0, 0, 0] == 1:
                raise Overloaded("the queue is full; try again in 3 s.", 3)
            return await super().segment(image, ask)

    with client_of(Full()) as busy:
        answer = ask_several(busy, *files, format="json")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        assert ask(busy, files[0][1]).status_code == 200


def test_several_images_are_with_the_model_at_once() -> None:
    """So that they can share a forward pass: each waits here until all have come."""

    class Meeting(Reader):
        met = asyncio.Barrier(3)

        async def segment(self, image: Photo, ask: Ask) -> Segmented:
            async with asyncio.timeout(30):
                await self.met.wait()
            return await super().segment(image, ask)

    with client_of(Meeting()) as client:
        assert ask_several(client, *[("a.png", photo(blocks([0])))] * 3, format="json").status_code == 200


@given(index=st.integers(0, 999), given_=st.one_of(st.none(), st.text(max_size=100)))
@example(index=3, given_="../../etc/My photo.jpg")
@example(index=0, given_="C:\\photos\\con.jpg")
def test_a_name_in_the_zip_is_tame(index: int, given_: str | None) -> None:
    """Whatever the caller calls a file: its place, then letters, digits, dashes and underscores, and our suffix."""
    name = file_name(index, given_, ".png")
    stem = name.removesuffix(".png").removeprefix(f"{index:03d}")
    assert name == f"{index:03d}{stem}.png"
    assert all(character.isascii() and (character.isalnum() or character in "-_") for character in stem)
    assert len(name) < 80


def test_names_in_the_zip_tell_where_they_come_from() -> None:
    """The caller's own name is recognised."""
    assert file_name(3, "../../etc/My photo.jpg", ".png") == "003-My_photo.png"
    assert file_name(0, None, ".npy") == "000.npy"
    assert file_name(1, ".jpg", ".u8") == "001-jpg.u8"
