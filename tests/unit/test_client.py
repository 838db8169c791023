"""The Python client against the true app over a real network: every form of image, and all that a result holds."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sceneray.client import Client, Result
from sceneray.errors import ConfigError, DataError, ScenerayError, ServingError
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Limits
from serve.schemas import Ask
from serve.segmenter import Segmenter
from tests.bundles import agree, half_bright, write_bundle
from tests.support import free_port
from tests.unit.serve.servers import uvicorn_of
from tests.unit.serve.uploads import encoded

KEY = "open sesame"
LIMITS = Limits(max_items=4, max_cost=100_000, max_queued_cost=400_000, max_wait_s=0.001)
IMAGE, MASK = half_bright()
JPEG = encoded(Image.fromarray(IMAGE), "JPEG", quality=95)
BROKEN = JPEG[: len(JPEG) // 2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def url(bundle: str) -> Iterator[str]:
    """A real server over the real model, which wants a key."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    settings = ApiSettings(UploadLimits(max_bytes=100_000), key_digests=(digest,))
    with uvicorn_of(create_app(Segmenter.load(bundle, LIMITS, "cpu"), settings)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    """A client with the key."""
    with Client(url, KEY) as client:
        yield client


def failure(url: str, **options: Any) -> ScenerayError:
    """What one request raises."""
    with Client(url, **options) as client, pytest.raises(ScenerayError) as raised:
        client.segment(JPEG)
    return raised.value


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "picture", "array"])
def test_an_image_in_any_form_gets_its_mask(client: Client, tmp_path: Path, kind: str) -> None:
    """A file by its name, its bytes, a PIL image and an array are answered alike, with all that a result has."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEG)
    forms = {"str": str(path), "path": path, "bytes": JPEG, "picture": Image.open(io.BytesIO(JPEG)), "array": IMAGE}
    result = client.segment(forms[kind])
    assert agree(result.mask, MASK)
    assert result.mask.dtype == np.uint8
    assert {entry["name"] for entry in result.classes} == {"dark", "bright"}
    assert sum(entry["share"] for entry in result.classes) == pytest.approx(1)
    assert (result.model.name, result.model.version, len(result.model.digest)) == ("brightness", "7", 64)
    assert result.request_id
    assert 0 < result.times["total"] <= result.times["call"]
    assert result.confidence is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode_are_sent(client: Client, mode: str) -> None:
    """A PIL image of whatever mode, and a grey array, are answered with masks of their size."""
    picture = Image.fromarray(np.full((20, 30), 9000, np.uint16)) if mode == "I;16" else Image.new(mode, (30, 20))
    assert client.segment(picture).mask.shape == (20, 30)
    assert client.segment(np.zeros((20, 30), np.uint8)).mask.shape == (20, 30)


def test_a_picture_that_lies_on_its_side_is_answered_upright(client: Client) -> None:
    """A PIL image with an EXIF orientation has the mask of the file that it came from."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(Image.fromarray(np.rot90(IMAGE).copy()), "PNG", exif=exif)
    assert agree(client.segment(file).mask, MASK)
    with Image.open(io.BytesIO(file)) as picture:
        assert np.array_equal(client.segment(picture).mask, client.segment(file).mask)


def test_the_wanted_classes_alone_are_kept(client: Client) -> None:
    """With `classes` all other pixels are 255; a class that the model lacks is a DataError with the server's hint."""
    result = client.segment(IMAGE, classes=["bright"])
    whole = client.segment(IMAGE).mask
    assert np.array_equal(result.mask, np.where(whole == 1, 1, 255))
    assert [entry["name"] for entry in result.classes] == ["bright"]
    with pytest.raises(DataError, match="did you mean 'bright'"):
        client.segment(IMAGE, classes=["brihgt"])
    for wrong in ([], "bright"):
        with pytest.raises(ConfigError, match="a list of at least one"):
            client.segment(IMAGE, classes=wrong)


def test_confidence_comes_where_it_is_asked_for(client: Client, bundle: str) -> None:
    """The confidence map is the model's own."""
    own = asyncio.run(Segmenter.load(bundle, LIMITS, "cpu").segment(IMAGE, Ask(confidence=True)))
    result = client.segment(IMAGE, confidence=True)
    assert np.array_equal(result.confidence, own.confidence)
    assert np.array_equal(result.mask, own.mask)


def test_many_images_are_answered_in_order(client: Client) -> None:
    """Thirty pictures of thirty sizes, eight at a time, have their results in the order they were given."""
    sizes = [(20 + n, 60 - n) for n in range(30)]
    results = client.segment_many((np.zeros((*size, 3), np.uint8) for size in sizes), parallel=8)
    assert [result.mask.shape for result in results] == sizes


def test_an_image_that_is_refused_among_many(client: Client) -> None:
    """Its DataError is raised at its turn, or stands in its place where the caller wants that; others are answered."""
    images = [IMAGE, BROKEN, IMAGE]
    results = client.segment_many(images)
    assert isinstance(next(results), Result)
    with pytest.raises(DataError, match="422"):
        next(results)
    kinds = [type(result) for result in client.segment_many(images, errors="return")]
    assert kinds == [Result, DataError, Result]


def test_many_images_are_taken_as_they_are_needed(client: Client) -> None:
    """Of a thousand pictures only as many are made as can be under way when the first result is there."""
    made = []

    def pictures() -> Iterator[Any]:
        for number in range(1000):
            made.append(number)
            yield IMAGE

    results = client.segment_many(pictures(), parallel=2)
    next(results)
    results.close()
    assert len(made) == 4
    with pytest.raises(ConfigError, match="parallel must be at least 1"):
        client.segment_many([IMAGE], parallel=0)


def test_what_fails_for_all_ends_many(url: str) -> None:
    """A wrong key is no image's fault: it is raised, also where refused images are kept."""
    with Client(url, "wrong") as client, pytest.raises(ServingError, match="401"):
        list(client.segment_many([IMAGE, IMAGE], errors="return"))


def test_the_model_and_its_readiness(client: Client, url: str) -> None:
    """`model` tells what is served; `ready` needs no key, and is False where nobody answers."""
    about = client.model()
    assert (about["name"], about["version"]) == ("brightness", "7")
    assert [entry["name"] for entry in about["classes"]] == ["dark", "bright", "never"]
    assert client.ready()
    with Client(url) as stranger:
        assert stranger.ready()
    with Client(f"http://127.0.0.1:{free_port()}") as nobody:
        assert not nobody.ready()


def test_a_wrong_key_is_told_and_never_shown(url: str) -> None:
    """401 is a ServingError with the server's sentence; the key is in no message."""
    error = failure(url, key="a wrong key")
    assert isinstance(error, ServingError)
    assert "an API key is required" in str(error)
    assert "a wrong key" not in str(error)
    with pytest.raises(ConfigError, match="printable") as raised:
        Client(url, key="secret\n")
    assert "secret" not in str(raised.value)
