"""The Open Inference Protocol and the model behind it: many images, overload, replacement, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sceneray.masks import Photo
from serve import oip_messages
from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Overloaded
from serve.schemas import Ask, Rules, Segmented
from serve.segmenter import Segmenter
from tests.unit.serve.tensors import (
    LIMITS,
    NAME,
    UPLOADS,
    assert_error,
    binary,
    masks_of,
    message,
    own_masks,
    pictures,
    post,
)
from tests.unit.serve.uploads import Client

GOOD = message(pictures(1))


def test_nested_lists_are_read_as_flat_ones(client: Client) -> None:
    """Numbers nested as the shape says and the same numbers in one list give the same masks."""
    images = pictures(2)
    nested = message(images)
    nested["inputs"][0]["data"] = images.tolist()
    assert np.array_equal(masks_of(post(client, nested)), masks_of(post(client, message(images))))


def test_long_json_is_read_as_short_json(segmenter: Segmenter) -> None:
    """A request whose JSON is read in a thread is answered like one in binary."""
    images = np.tile(pictures(1), (1, 8, 8, 1))
    assert len(json.dumps(message(images))) > 100_000
    wanted = [{"name": "mask", "parameters": {"binary_data": False}}]
    with Client(create_app(segmenter, ApiSettings(UploadLimits()))) as client:
        long = masks_of(post(client, message(images)))
        assert np.array_equal(long, masks_of(post(client, *binary(images, outputs=wanted))))


def test_the_answer_names_model_request_and_stages(client: Client) -> None:
    """The headers of /v1/segment are there too: model, version, digest, the request's id, the stages' times."""
    answer = post(client, *binary(pictures(1)))
    assert answer.headers["x-model-name"] == NAME
    assert answer.headers["x-model-version"] == "7"
    assert len(answer.headers["x-model-digest"]) == 64
    assert answer.headers["x-request-id"]
    stages = [entry.split(";")[0].strip() for entry in answer.headers["server-timing"].split(",")]
    assert {"read", "model", "encode", "total"} <= set(stages)


def test_the_images_of_a_request_run_together(bundle: str) -> None:
    """Four images of one request fill one batch: they are asked for at once, not one after another."""
    limits = replace(LIMITS, max_wait_s=1.0)
    with Client(create_app(Segmenter.load(bundle, limits, "cpu", rules=Rules("fast")), ApiSettings(UPLOADS))) as client:
        assert post(client, message(pictures(4))).headers["x-batch-size"] == "4"


def test_more_images_than_run_at_once_are_answered_in_order(segmenter: Segmenter) -> None:
    """The most images of a request are all answered, each in its place."""
    images = pictures(oip_messages.MAX_IMAGES)
    with Client(create_app(segmenter, ApiSettings(replace(UPLOADS, max_bytes=200_000)))) as client:
        assert np.array_equal(masks_of(post(client, *binary(images))), own_masks(segmenter, images))


def test_more_pixels_than_may_ever_be_in_work_are_refused_for_good(segmenter: Segmenter) -> None:
    """A request above the room of the whole endpoint is a 413; to come back later would not help."""
    with Client(create_app(segmenter, ApiSettings(UPLOADS, max_pixels_in_work=16 * 24))) as client:
        assert_error(post(client, message(pictures(2))), 413, "too_many_images")
        assert post(client, message(pictures(1))).status_code == 200


def test_an_image_that_the_model_cannot_take_is_a_422(client: Client) -> None:
    """A well-formed tensor of images that are too small for the network is told so, as /v1/segment does."""
    assert_error(post(client, message(np.zeros((2, 4, 4, 3), np.uint8))), 422, "unfit_image")


def test_an_identifier_comes_back_as_it_was(client: Client) -> None:
    """Any string may be the id, even one that UTF-8 cannot hold."""
    for name in ("", "ü → ☃", "\ud800", 'quote"\n'):
        assert post(client, {**GOOD, "id": name}).json()["id"] == name
    assert "id" not in post(client, GOOD).json()


def test_paths_that_are_odd_are_unknown_models(client: Client) -> None:
    """Names and versions are compared, never used: whatever stands in the path is a 404 in JSON."""
    for name in ("%00", "%ff", "%2e%2e", "%F0%9F%98%80", "a" * 2000):
        assert client.get(f"/v2/models/{name}").status_code == 404
        assert client.get(f"/v2/models/{NAME}/versions/{name}").status_code == 404
        assert post(client, GOOD, path=f"/v2/models/{name}/infer").status_code == 404


def test_openapi_documents_both_paths(client: Client) -> None:
    """With and without a version, the paths stand in the schema, with both kinds of body, the errors, and an example
    that is answered.
    """
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        infer = paths[f"{path}/infer"]["post"]
        assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
        assert {"200", "400", "401", "404", "413", "415", "422", "429"} <= set(infer["responses"])
        assert {"get"} == set(paths[path]) == set(paths[f"{path}/ready"]) == set(paths[f"{path}/config"])
        assert post(client, infer["requestBody"]["content"]["application/json"]["example"]).status_code == 200
        named = {parameter["name"] for parameter in infer["parameters"]}
        assert named - {oip_messages.HEADER} <= {"name", "version"}


class Around:
    """The real segmenter with something before and after it."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self.asks: list[Ask] = []
        self.fails_from: int | None = None  # which call on raises Overloaded
        self.versions = ["7"]  # of the answers, taken in turn
        self.asked_about = 0

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The segmenter's answer, under the next version's name."""
        self.asks.append(ask)
        if self.fails_from is not None and len(self.asks) > self.fails_from:
            raise Overloaded("the queue is full; try again in 3 s.", 3)
        version = self.versions[(len(self.asks) - 1) % len(self.versions)]
        answer = await self._segmenter.segment(image, ask)
        return replace(answer, model=replace(answer.model, version=version, digest=version * 64))

    async def describe(self) -> dict[str, Any]:
        """The first version's description."""
        self.asked_about += 1
        return {**await self._segmenter.describe(), "version": self.versions[0]}


@pytest.fixture
def around(segmenter: Segmenter) -> Around:
    """The real segmenter, to be interfered with."""
    return Around(segmenter)


def test_the_parameters_reach_the_model(around: Around) -> None:
    """The timeout in microseconds becomes a deadline, and the rule is handed on; without them there is none."""
    with Client(create_app(around, ApiSettings(UPLOADS))) as client:
        assert post(client, {**GOOD, "parameters": {"timeout": 60_000_000, "input": "native"}}).status_code == 200
        assert post(client, GOOD).status_code == 200
    first, second = around.asks
    assert first.deadline is not None
    assert first.rule == "native"
    assert second.rule is None
    assert second.deadline is None or second.deadline > first.deadline


def test_the_model_is_asked_for_its_name_once(around: Around) -> None:
    """The second request under a name that is known spares the way to the model; an unknown name never does."""
    with Client(create_app(around, ApiSettings(UPLOADS))) as client:
        for _ in range(3):
            assert post(client, GOOD).status_code == 200
        assert around.asked_about == 1
        assert_error(post(client, GOOD, path="/v2/models/other/infer"), 404, "unknown_model")
        assert around.asked_about == 2


def test_overload_calls_off_the_whole_request(around: Around) -> None:
    """Where the third of ten images is refused, all of it is a 429 with Retry-After, and its room is free again."""
    around.fails_from = 2
    with Client(create_app(around, ApiSettings(UPLOADS, max_pixels_in_work=10 * 16 * 24))) as client:
        answer = post(client, *binary(pictures(10)))
        assert_error(answer, 429, "overloaded")
        assert answer.headers["retry-after"] == "3"
        around.fails_from = None
        assert post(client, *binary(pictures(10))).status_code == 200


def test_a_model_that_is_replaced_meanwhile_never_answers_under_the_old_name(around: Around) -> None:
    """Images answered by two versions are a 503; a version asked for and no longer there is a 404."""
    with Client(create_app(around, ApiSettings(UPLOADS))) as client:
        assert post(client, GOOD).status_code == 200
        around.versions = ["8", "7"]
        answer = post(client, message(pictures(2)))
        assert_error(answer, 503, "model_replaced")
        assert answer.headers["retry-after"] == "1"
        around.versions = ["8"]
        assert_error(post(client, GOOD, path=f"/v2/models/{NAME}/versions/7/infer"), 404, "unknown_version")
        assert post(client, GOOD, path=f"/v2/models/{NAME}/versions/8/infer").json()["model_version"] == "8"


class Gone:
    """A backend that does not answer."""

    async def segment(self, image: Photo, ask: Ask) -> Segmented:  # noqa: ARG002
        """Fails."""
        raise RuntimeError("secret path /x")

    async def describe(self) -> dict[str, Any]:
        """Fails."""
        raise RuntimeError("secret path /x")


def test_a_model_that_does_not_answer_is_not_ready() -> None:
    """Ready is a 503 with Retry-After then, and nothing inside is told."""
    with Client(create_app(Gone(), ApiSettings(UPLOADS))) as client:
        answer = client.get(f"/v2/models/{NAME}/ready")
        assert_error(answer, 503, "not_ready")
        assert answer.headers["retry-after"] == "1"
        assert "secret" not in answer.text
