"""The forms of an answer over a model that reads its mask off the picture: each form gives exactly that mask back."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from sceneray.data.images import decode_image, decode_label
from sceneray.masks import Mask
from serve.answer_choice import negotiate
from serve.answers import FORMATS, INCLUDES
from serve.api import ApiSettings, create_app
from serve.schemas import Ask, SegmentationBody, SegmentBody
from tests.mask_readers import decoded, filled
from tests.unit.serve.reader import (
    CLASSES,
    Reader,
    Unsure,
    ask,
    blocks,
    client_of,
    from_base64,
    photo,
)
from tests.unit.serve.uploads import Client

MASKS = arrays.arrays(
    np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([0, 1, 2, 255])
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    """The model behind `client`."""
    return Reader()


@pytest.fixture(scope="module")
def client(reader: Reader) -> Iterator[Client]:
    """A client of the app over it."""
    with client_of(reader) as client:
        yield client


def by_class(answer: Any, part: str, read: Callable[[Any], np.ndarray]) -> Mask:
    """The mask that `part` of each class in a JSON answer makes."""
    body = SegmentationBody.model_validate_json(answer.content)
    mask = np.full((body.height, body.width), 255, np.uint8)
    for entry in answer.json()["classes"]:
        mask[read(entry[part])] = entry["id"]
    return mask


def by_segment(answer: Any) -> Mask:
    """The mask that Hugging Face's segments make."""
    ids = {entry.name: entry.id for entry in CLASSES}
    mask = None
    for segment in answer.json():
        inside = from_base64(segment["mask"])
        assert set(np.unique(inside)) <= {0, 255}
        mask = np.full_like(inside, 255) if mask is None else mask
        mask[inside == 255] = ids[segment["label"]]
    return mask if mask is not None else np.full((0, 0), 255, np.uint8)


def by_colour(answer: Any) -> Mask:
    """The class whose colour is nearest, where the overlay hides the photograph."""
    colours = np.array([entry.color for entry in CLASSES])
    distance = np.abs(decode_image(answer.content)[:, :, None].astype(int) - colours).sum(-1)
    return distance.argmin(-1).astype(np.uint8)


def raw_mask(answer: Any) -> Mask:
    """The bytes of `raw` in the shape that the headers tell."""
    height, width = int(answer.headers["x-mask-height"]), int(answer.headers["x-mask-width"])
    return np.frombuffer(answer.content, answer.headers["x-mask-dtype"]).reshape(height, width)


# Query, Accept, and what makes the mask of the answer; `overlay` and `confidence` hold something else and follow below.
EXACT: dict[str, tuple[dict[str, str], Callable[[Any], Mask]]] = {
    "png": ({"format": "png"}, lambda answer: decode_label(answer.content)),
    "raw": ({"format": "raw"}, raw_mask),
    "npy": ({"format": "npy"}, lambda answer: np.load(io.BytesIO(answer.content), allow_pickle=False)),
    "hf": ({"format": "hf"}, by_segment),
    "json, mask": ({"format": "json", "include": "mask"}, lambda answer: from_base64(answer.json()["mask"])),
    "json, rle": ({"format": "json", "include": "rle"}, lambda answer: by_class(answer, "rle", decoded)),
    "json, polygons": (
        {"format": "json", "include": "polygons"},
        lambda answer: by_class(
            answer, "polygons", lambda rings: filled(rings, (answer.json()["height"], answer.json()["width"]))
        ),
    ),
}


def test_every_format_is_read_back_somewhere_here() -> None:
    """No format of the registry, and nothing that JSON may include, is left out of the tests below."""
    assert {name.partition(",")[0] for name in EXACT} | {"overlay", "confidence"} == set(FORMATS)
    assert {name.partition(", ")[2] for name in EXACT if ", " in name} == set(INCLUDES)


@pytest.mark.parametrize("name", EXACT)
@given(mask=MASKS)
@example(mask=np.zeros((1, 1), np.uint8))
def test_an_answer_holds_exactly_the_mask(client: Client, name: str, mask: Mask) -> None:
    """Whatever the mask, the answer decodes to it, pixels of no class included; its headers tell the shape."""
    query, read = EXACT[name]
    answer = ask(client, photo(mask), **query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == FORMATS[query["format"]].media_types[0]
    assert (answer.headers["x-mask-height"], answer.headers["x-mask-width"]) == tuple(map(str, mask.shape))
    if name == "hf" and (mask == 255).all():
        assert answer.json() == []
    else:
        assert np.array_equal(read(answer), mask)


@pytest.mark.parametrize("kind", ["image/jpeg", "image/webp"])
def test_an_opaque_overlay_shows_the_mask_in_its_colours(client: Client, kind: str) -> None:
    """With opacity=1 the nearest colour is the class but near edges, in JPEG and in WebP."""
    mask = blocks([0, 1, 2], [2, 0, 1])
    answer = ask(client, photo(mask), kind, format="overlay", opacity=1)
    assert answer.headers["content-type"] == kind
    assert np.mean(by_colour(answer) == mask) > 0.95
    plain = ask(client, photo(mask), kind, format="overlay", opacity=0)
    assert np.abs(decode_image(plain.content).astype(int) - decode_image(photo(mask))).mean() < 3


@given(confidence=arrays.arrays(np.uint8, (5, 7)))
def test_the_confidence_map_comes_as_a_grey_picture(client: Client, confidence: Mask) -> None:
    """?format=confidence is the map; JSON has the same in base64, where it is asked for."""
    body = photo(np.zeros((5, 7), np.uint8), confidence)
    picture = ask(client, body, format="confidence")
    assert Image.open(io.BytesIO(picture.content)).mode == "L"
    assert np.array_equal(decode_label(picture.content), confidence)
    told = ask(client, body, format="json", confidence="true").json()
    assert np.array_equal(from_base64(told["confidence"]), confidence)
    assert "confidence" not in ask(client, body, format="json").json()


def test_json_holds_no_more_than_asked_for(client: Client) -> None:
    """Without include, classes have a share and no pixels; parts are added by name, with commas or repeated."""
    body = photo(blocks([0, 1]))
    plain = ask(client, body, format="json").json()
    assert set(plain) == {"width", "height", "classes", "model"}
    assert set(plain["classes"][0]) == {"id", "name", "color", "share"}
    both = ask(client, body, format="json", include="rle,polygons").json()
    assert set(both["classes"][0]) == {"id", "name", "color", "share", "rle", "polygons"}
    assert both == ask(client, body, format="json", include=["rle", "polygons"]).json()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("classes", ["car", "1", "car,255"])
def test_a_filter_leaves_the_named_classes(client: Client, name: str, classes: str) -> None:
    """Pixels of other classes are of no class in every format; a class may be named by its id."""
    mask = blocks([0, 1, 2], [1, 1, 255])
    query, read = EXACT[name]
    answer = ask(client, photo(mask), **query, classes=classes)
    if "255" in classes:
        assert answer.json()["error_type"] == "unknown_class"
    else:
        assert np.array_equal(read(answer), np.where(mask == 1, 1, 255))


def test_a_filter_rules_shares_overlay_and_confidence(client: Client) -> None:
    """Shares stay parts of the whole image; the photograph shows where a class is left out; confidence is 0 there."""
    mask = blocks([0, 1, 2, 2])
    body = photo(mask)
    rows = ask(client, body, format="json", classes="car,tree").json()["classes"]
    assert {row["name"]: row["share"] for row in rows} == {"car": 0.25, "tree": 0.5}
    assert rows == ask(client, body, format="json", classes=["tree", "car"]).json()["classes"]
    blended = decode_image(ask(client, body, format="overlay", classes="car", opacity=1).content).astype(int)
    assert np.abs(blended[:, 40:] - decode_image(body)[:, 40:]).max() < 20
    confidence = decode_label(ask(client, body, format="confidence", classes="car").content)
    assert np.array_equal(confidence, np.where(mask == 1, 200, 0))


def test_an_unknown_class_is_refused_with_the_known_ones(client: Client) -> None:
    """422, the nearest name first."""
    answer = ask(client, photo(blocks([0])), classes="road,trees")
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "unknown_class"
    assert "did you mean 'tree'? known: tree, car, road" in answer.json()["error"]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"format": "jsn"}, "did you mean 'json'"),
        ({"include": "rle"}, "format=json"),
        ({"format": "hf", "include": "rle"}, "format=json"),
        ({"format": "png", "opacity": "0.3"}, "format=overlay"),
        ({"format": "raw", "confidence": "true"}, "format=json"),
        ({"format": "overlay", "opacity": "1.01"}, "opacity"),
        ({"format": "overlay", "opacity": "nan"}, "opacity"),
        ({"format": "json", "include": "rel"}, "did you mean 'rle'"),
        ({"input": "crop"}, "native"),
        ({"formt": "json"}, "formt"),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused(client: Client, query: dict[str, str], told: str) -> None:
    """Unknown parameters and values, and those that the format has no use for, are a 422 that says what fits."""
    answer = ask(client, photo(blocks([0])), **query)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "invalid_parameter"
    assert told in answer.json()["error"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, Ask()),
        ({"format": "confidence"}, Ask(confidence=True)),
        ({"format": "hf"}, Ask(confidence=True)),
        ({"format": "json"}, Ask()),
        ({"format": "json", "confidence": "true"}, Ask(confidence=True)),
        ({"input": "native"}, Ask(rule="native")),
        ({"input": "resize", "format": "raw"}, Ask(rule="resize")),
        ({"input": "window"}, Ask(rule="window")),
    ],
)
def test_the_model_is_asked_for_what_the_answer_needs(
    client: Client, reader: Reader, query: dict[str, str], expected: Ask
) -> None:
    """A confidence map only where the answer holds one, and the input rule that the caller names."""
    ask(client, photo(blocks([0])), **query)
    asked = reader.asks[-1]
    assert (asked.confidence, asked.rule) == (expected.confidence, expected.rule)


def test_polygons_of_noise_are_refused() -> None:
    """A mask with an edge at every pixel would take seconds as polygons; as run lengths it is answered."""
    noise = photo(np.random.default_rng(0).integers(0, 3, (600, 700), dtype=np.uint8))
    with Client(create_app(Reader(), ApiSettings())) as client:
        answer = ask(client, noise, format="json", include="polygons")
        assert (answer.status_code, answer.json()["error_type"]) == (422, "too_ragged")
        assert ask(client, noise, format="json", include="rle").status_code == 200


def test_a_model_without_confidence_says_so() -> None:
    """The map itself is a 422; Hugging Face's score, which may be missing, is null."""
    with client_of(Unsure()) as client:
        for query in ({"format": "confidence"}, {"format": "json", "confidence": "true"}):
            answer = ask(client, photo(blocks([0])), **query)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "no_confidence")
        assert [row["score"] for row in ask(client, photo(blocks([0, 1])), format="hf").json()] == [None, None]


def test_a_segments_score_is_its_mean_confidence(client: Client) -> None:
    """In Hugging Face's shape each class has the mean of its own pixels, between 0 and 1, the largest class first."""
    mask = blocks([0, 0, 1])
    confidence = np.where(mask == 1, 51, 255).astype(np.uint8)
    confidence[0, 0] = 0
    rows = [SegmentBody(**row) for row in ask(client, photo(mask, confidence), format="hf").json()]
    assert [row.label for row in rows] == ["road", "car"]
    assert [row.score for row in rows] == pytest.approx([1 - 1 / 512, 0.2], abs=1e-4)


@pytest.mark.parametrize(
    ("accept", "name", "chosen"),
    [
        (None, None, ("png", "image/png")),
        ("*/*", None, ("png", "image/png")),
        ("image/*", None, ("png", "image/png")),
        ("application/json", None, ("json", "application/json")),
        ("image/png;q=0.5, application/json", None, ("json", "application/json")),
        ("image/png;q=0, */*", None, ("json", "application/json")),
        ("text/html, image/gif, image/*;q=0.8", None, ("png", "image/png")),
        ("APPLICATION/JSON ; Q=1.0", None, ("json", "application/json")),
        ("image/jpeg", None, ("overlay", "image/jpeg")),
        ("image/webp", None, ("overlay", "image/webp")),
        ("application/octet-stream", None, ("raw", "application/octet-stream")),
        ("application/x-npy", None, ("npy", "application/x-npy")),
        (None, "overlay", ("overlay", "image/jpeg")),
        ("image/webp, image/jpeg;q=0.9", "overlay", ("overlay", "image/webp")),
        ("image/png", "overlay", ("overlay", "image/jpeg")),
        ("text/html", "json", ("json", "application/json")),
        ("application/json", "confidence", ("confidence", "image/png")),
    ],
)
def test_the_query_wins_and_accept_is_negotiated(accept: str | None, name: str | None, chosen: tuple[str, str]) -> None:
    """A named format is answered; else the most specific range decides, then its q, then our own order."""
    assert negotiate(name, accept) == chosen
