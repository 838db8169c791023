"""The routes over a real network in this process: every form of answer, and every bad upload, survived."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sceneray.data.images import decode_image, decode_label
from sceneray.masks import Photo, overlay
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Limits, Overloaded
from serve.schemas import Ask, ErrorBody, ModelBody, PredictionBody, Rules, SegmentationBody, Segmented
from serve.segmenter import Segmenter
from tests.bundles import CLASSES, agree, half_bright, write_bundle
from tests.unit.serve.uploads import Client, encoded, png_header

LIMITS = Limits(max_items=4, max_cost=100_000, max_queued_cost=200_000, max_wait_s=0.001)
UPLOADS = UploadLimits(max_bytes=50_000, max_pixels=20_000, max_side=300)
IMAGE, MASK = half_bright()
JPEG = encoded(Image.fromarray(IMAGE), "JPEG", quality=95)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    """The real thing: a bundle's predictor behind the batcher, in this process."""
    return Segmenter.load(write_bundle(str(tmp_path_factory.mktemp("bundle"))), LIMITS, "cpu")


@pytest.fixture(scope="module")
def client(segmenter: Segmenter) -> Iterator[Client]:
    """A client of the app over the real segmenter."""
    with Client(create_app(segmenter, ApiSettings(UPLOADS))) as client:
        yield client


def post(client: Client, body: bytes = JPEG, **options: Any) -> Any:
    """A raw upload to /v1/segment."""
    headers = {"Content-Type": "image/jpeg"} | options.pop("headers", {})
    return client.post("/v1/segment", content=body, headers=headers, **options)


def assert_lives(client: Client) -> None:
    """A good photograph is still answered with its mask."""
    answer = post(client)
    assert answer.status_code == 200
    assert agree(decode_label(answer.content), MASK)


def assert_error(answer: Any, status: int, kind: str) -> None:
    """The answer is the JSON error of that status and kind, under the id that the header names."""
    assert answer.status_code == status, answer.text
    body = ErrorBody.model_validate_json(answer.content)
    assert body.error_type == kind
    assert body.error
    assert body.request_id == answer.headers["x-request-id"]


def test_the_default_answer_is_the_indexed_mask(client: Client) -> None:
    """A raw body without Accept gives the mask as a palette PNG, with the model's version in a header."""
    answer = post(client)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-model-version"] == "7"
    assert answer.headers["x-batch-size"] == "1"
    assert answer.headers["vary"] == "Accept"
    assert agree(decode_label(answer.content), MASK)
    colours = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    assert colours[0, 0].tolist() == list(CLASSES[0].color)
    assert colours[0, -1].tolist() == list(CLASSES[1].color)


def test_a_form_is_answered_as_a_raw_body(client: Client) -> None:
    """The multipart field `image` and the raw body give the same bytes."""
    form = client.post("/v1/segment", files={"image": ("photo.jpg", JPEG, "image/jpeg")})
    assert form.content == post(client).content


def test_json_tells_what_is_in_the_image(client: Client) -> None:
    """As application/json: the size, the classes present with their shares, and the model; not the absent class."""
    answer = post(client, headers={"Accept": "application/json"})
    body = SegmentationBody.model_validate_json(answer.content)
    assert (body.width, body.height) == (64, 48)
    assert [share.name for share in body.classes] in (["dark", "bright"], ["bright", "dark"])
    assert sum(share.share for share in body.classes) == pytest.approx(1)
    assert body.classes[0].share == pytest.approx(0.5, abs=0.1)
    assert (body.model.name, body.model.version) == ("brightness", "7")


def test_the_overlay_is_the_photograph_blended_with_its_mask(client: Client) -> None:
    """?format=overlay, and Accept: image/jpeg alike, give a JPEG of the blend at the photograph's size."""
    answer = post(client, params={"format": "overlay"})
    assert answer.headers["content-type"] == "image/jpeg"
    assert post(client, headers={"Accept": "image/jpeg"}).content == answer.content
    mask = decode_label(post(client).content)
    expected = overlay(decode_image(JPEG), mask, CLASSES)
    assert np.abs(decode_image(answer.content).astype(int) - expected).mean() < 3


def test_predict_answers_as_the_article(client: Client) -> None:
    """POST /predict: class ids row by row, and the names by id."""
    answer = client.post("/predict", files={"image": ("photo.jpg", JPEG, "image/jpeg")})
    body = PredictionBody.model_validate_json(answer.content)
    assert agree(np.array(body.prediction, np.uint8), MASK)
    assert body.classes == ["dark", "bright", "never"]


def test_the_model_describes_itself(client: Client) -> None:
    """GET /v1/model: classes with colours, name, version, digest, metrics."""
    body = ModelBody.model_validate_json(client.get("/v1/model").content)
    assert [(entry.id, entry.name, entry.color) for entry in body.classes] == [(c.id, c.name, c.color) for c in CLASSES]
    assert (body.name, body.version, len(body.digest)) == ("brightness", "7", 64)
    assert body.metrics["values"] == {"miou": 0.5}


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/livez", "/readyz"])
def test_health(client: Client, path: str) -> None:
    """Live and ready are 200 under both habits' names."""
    assert client.get(path).status_code == 200


def test_the_mask_lies_in_the_frame_that_people_see(client: Client) -> None:
    """A photograph stored on its side is answered upright: the mask has the displayed width and height."""
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.fromarray(np.rot90(IMAGE).copy())  # turning it clockwise, as the tag says, gives IMAGE again
    answer = post(client, encoded(sideways, "JPEG", quality=95, exif=exif))
    assert agree(decode_label(answer.content), MASK)


def test_equal_shapes_share_a_batch(tmp_path: Path) -> None:
    """In fast mode, four images at once, two of each shape: each in a batch of two, answered as it would be alone."""
    segmenter = Segmenter.load(write_bundle(str(tmp_path)), LIMITS, "cpu", rules=Rules(mode="fast"))
    pictures = [half_bright(48, 64), half_bright(64, 48), half_bright(48, 64), half_bright(64, 48)]

    async def together() -> list[Segmented]:
        return await asyncio.gather(*(segmenter.segment(image) for image, _ in pictures))

    answers = asyncio.run(together())
    assert [answer.batch_size for answer in answers] == [2, 2, 2, 2]
    assert all(agree(answer.mask, mask) for answer, (_, mask) in zip(answers, pictures, strict=True))


BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], 422, "broken_image"),
    "text": (b"this is no photograph", 415, "unsupported_image"),
    "empty": (b"", 422, "empty_image"),
    "header bomb": (png_header(60_000, 60_000), 413, "image_too_large"),
    "too many pixels": (png_header(200, 101), 413, "image_too_large"),
    "too large a body": (b"\xff" * 50_001, 413, "body_too_large"),
    "gif": (encoded(Image.new("RGB", (16, 16)), "GIF"), 415, "unsupported_image"),
    "pixels that are not there": (png_header(100, 100), 422, "broken_image"),
    "too small": (encoded(Image.new("RGB", (7, 64)), "PNG"), 422, "unfit_image"),
}


@pytest.mark.parametrize("way", ["raw", "form"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_and_the_server_lives_on(client: Client, name: str, way: str) -> None:
    """Each bad body, raw or in a form, is a 4xx with a JSON error; the next good one is answered."""
    body, status, kind = BAD[name]
    if way == "raw":
        answer = post(client, body)
    else:
        answer = client.post("/v1/segment", files={"image": ("photo.jpg", body, "image/jpeg")})
    assert_error(answer, status, kind)
    assert_lives(client)


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        ({"files": {"photo": ("photo.jpg", JPEG, "image/jpeg")}}, 422, "missing_field"),
        ({"data": {"image": "text"}, "files": {"other": ("o", b"x")}}, 422, "missing_field"),
        ({"files": [("image", ("a", JPEG))] * 17}, 400, "bad_request"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "bad_request"),
        ({"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 4, ""),
        (
            {"content": JPEG, "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
            415,
            "unsupported_media_type",
        ),
        ({"json": {"image": "http://example.org/photo.jpg"}}, 415, "unsupported_media_type"),
        ({"content": JPEG, "params": {"format": "sideways"}}, 422, "invalid_parameter"),
        ({"content": JPEG, "params": {"view": "overlay"}}, 422, "invalid_parameter"),
        ({"content": JPEG, "headers": {"Accept": "text/html"}}, 406, "not_acceptable"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_lives_on(
    client: Client, request_: dict[str, Any], status: int, kind: str
) -> None:
    """Wrong fields, types, parameters and forms of answer are 4xx with a JSON error."""
    answer = client.post("/v1/segment", **request_)
    if kind:
        assert_error(answer, status, kind)
    else:
        assert 400 <= answer.status_code < 500
        ErrorBody.model_validate_json(answer.content)
    assert_lives(client)


def test_predict_wants_a_form(client: Client) -> None:
    """/predict takes multipart alone; a raw body is a 415 that says so."""
    answer = client.post("/predict", content=JPEG, headers={"Content-Type": "image/jpeg"})
    assert_error(answer, 415, "unsupported_media_type")


def test_unknown_paths_and_methods_answer_in_json(client: Client) -> None:
    """404 and 405 have the same body as every other error."""
    assert_error(client.get("/nowhere"), 404, "not_found")
    assert_error(client.get("/v1/segment"), 405, "method_not_allowed")


def test_the_callers_request_id_is_kept(client: Client) -> None:
    """An id that came with the request names it in the error; whoever set it echoes it."""
    answer = post(client, b"no image", headers={"x-request-id": "mine-1"})
    assert answer.json()["request_id"] == "mine-1"


class Failing:
    """A backend that raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def segment(self, image: Photo, ask: Ask) -> Segmented:  # noqa: ARG002
        """Always fails."""
        raise self._error

    async def describe(self) -> dict[str, Any]:
        """Always fails."""
        raise self._error


def failing(error: Exception) -> Client:
    """A client of an app whose model raises `error`."""
    return Client(create_app(Failing(error), ApiSettings(UPLOADS)))


def test_overload_says_when_to_come_back() -> None:
    """A full queue is a 429 with Retry-After."""
    with failing(Overloaded("the queue is full; try again in 3 s.", 3)) as client:
        answer = post(client)
    assert_error(answer, 429, "overloaded")
    assert answer.headers["retry-after"] == "3"


def test_a_failing_model_is_a_500_that_tells_nothing_inside() -> None:
    """An unexpected error is JSON too, with the id under which the log has it, and without its text."""
    with failing(RuntimeError("secret path /x")) as client:
        answer = post(client)
        assert_error(answer, 500, "internal_error")
        assert "secret" not in answer.text
        assert_error(client.get("/v2/health/ready"), 503, "not_ready")
        assert client.get("/v2/health/live").status_code == 200


def test_pixels_in_work_are_bounded(segmenter: Segmenter) -> None:
    """An image that does not fit beside those in work is refused before it is decoded."""
    settings = ApiSettings(UPLOADS, max_pixels_in_work=48 * 64 - 1)
    with Client(create_app(segmenter, settings)) as client:
        assert_error(post(client), 429, "overloaded")


def test_bodies_in_work_are_bounded(segmenter: Segmenter) -> None:
    """A body that does not fit beside those in work is refused while it is read, and leaves no trace in the bound."""
    size = len(JPEG)
    with Client(create_app(segmenter, ApiSettings(UPLOADS, max_bytes_in_work=size - 1))) as client:
        assert_error(post(client), 429, "overloaded")
    with Client(create_app(segmenter, ApiSettings(UPLOADS, max_bytes_in_work=2 * size))) as client:
        assert [post(client).status_code for _ in range(3)] == [200] * 3


def test_keys_guard_the_model_and_not_its_health(segmenter: Segmenter) -> None:
    """With a key set, routes want it as a bearer or in X-API-Key; health and documentation stay open."""
    digest = hashlib.sha256(b"open sesame").hexdigest()
    form = {"image": ("photo.jpg", JPEG, "image/jpeg")}
    with Client(create_app(segmenter, ApiSettings(UPLOADS, key_digests=(digest,)))) as client:
        assert_error(post(client), 401, "unauthorized")
        assert_error(client.post("/predict", files=form), 401, "unauthorized")
        assert_error(client.get("/v1/model"), 401, "unauthorized")
        assert_error(post(client, headers={"Authorization": "Bearer wrong"}), 401, "unauthorized")
        assert post(client, headers={"Authorization": "Bearer open sesame"}).status_code == 200
        assert post(client, headers={"X-API-Key": "open sesame"}).status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/docs").status_code == 200


def test_the_documentation_needs_no_other_server(client: Client) -> None:
    """/docs loads its scripts and styles from here."""
    page = client.get("/docs").text
    assert "//" not in page.replace("//-->", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/docs-assets/{asset}" in page
        assert client.get(f"/docs-assets/{asset}").status_code == 200


def test_openapi_documents_both_bodies_and_all_answers(client: Client) -> None:
    """The schema names multipart and raw bodies, an answer, and the errors (the formats: test_answers.py)."""
    schema = client.get("/openapi.json").json()
    segment = schema["paths"]["/v1/segment"]["post"]
    assert {"multipart/form-data", "image/jpeg", "application/octet-stream"} <= set(segment["requestBody"]["content"])
    assert {"image/png", "application/json"} <= set(segment["responses"]["200"]["content"])
    assert {"401", "406", "413", "415", "422", "429"} <= set(segment["responses"])
    assert json.dumps(segment["responses"]["413"]).count("ErrorBody") == 1
