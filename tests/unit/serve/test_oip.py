"""The Open Inference Protocol as its users see it: NVIDIA's own client, unchanged, against a real server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from sceneray.masks import Photo
from serve.api import ApiSettings, create_app
from serve.schemas import Ask
from serve.segmenter import Segmenter
from tests.bundles import agree, half_bright
from tests.unit.serve.servers import uvicorn_of
from tests.unit.serve.tensors import LIMITS, NAME, UPLOADS, own_masks, pictures

KEY = "open sesame"


@pytest.fixture(scope="module")
def endpoint(bundle: str) -> Iterator[str]:
    """HOST:PORT of a real server over the real segmenter, which wants a key."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    app = create_app(Segmenter.load(bundle, LIMITS, "cpu"), ApiSettings(UPLOADS, key_digests=(digest,)))
    with uvicorn_of(app) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def stock(endpoint: str) -> Iterator[triton.InferenceServerClient]:
    """NVIDIA's client as it is installed."""
    with triton.InferenceServerClient(endpoint, concurrency=4) as client:
        yield client


def tensor(images: Photo, *, binary: bool = True) -> list[triton.InferInput]:
    """The images as tritonclient's input."""
    given_ = triton.InferInput("image", list(images.shape), "UINT8")
    given_.set_data_from_numpy(images, binary_data=binary)
    return [given_]


def auth() -> dict[str, str]:
    """The key's header, a new dict each time: tritonclient writes into it."""
    return {"X-API-Key": KEY}


def test_the_stock_client_finds_the_model(stock: triton.InferenceServerClient) -> None:
    """Health needs no key; metadata and configuration name the tensors, and 64 images at most."""
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready(NAME)
    assert stock.is_model_ready(NAME, "7")
    assert not stock.is_model_ready("other")
    assert not stock.is_model_ready(NAME, "8")
    assert "binary_tensor_data" in stock.get_server_metadata()["extensions"]
    for version in ("", "7"):
        assert stock.get_model_metadata(NAME, version, headers=auth()) == {
            "name": NAME,
            "versions": ["7"],
            "platform": "pytorch_pspnet",
            "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
            "outputs": [{"name": "mask", "datatype": "UINT8", "shape": [-1, -1, -1]}],
        }
        config = stock.get_model_config(NAME, version, headers=auth())
        assert (config["name"], config["max_batch_size"]) == (NAME, 64)
        assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]}]


@pytest.mark.parametrize("version", ["", "7"])
@pytest.mark.parametrize("out", [None, True, False], ids=["default", "binary", "json"])
@pytest.mark.parametrize("sent", [True, False], ids=["sent binary", "sent json"])
def test_the_stock_client_infers(
    stock: triton.InferenceServerClient, segmenter: Segmenter, sent: bool, out: bool | None, version: str
) -> None:
    """Three images each way give the masks of the model itself, under the request's id and the model's name."""
    images = pictures(3)
    outputs = None if out is None else [triton.InferRequestedOutput("mask", binary_data=out)]
    inputs = tensor(images, binary=sent)
    result = stock.infer(NAME, inputs, version, outputs=outputs, request_id="r-1", headers=auth())
    assert np.array_equal(result.as_numpy("mask"), own_masks(segmenter, images))
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == (NAME, "7", "r-1")
    assert ("data" in response["outputs"][0]) == (out is False)


def test_the_masks_are_right(stock: triton.InferenceServerClient) -> None:
    """A picture whose mask is known gets it."""
    image, mask = half_bright()
    result = stock.infer(NAME, tensor(image[None]), headers=auth())
    assert agree(result.as_numpy("mask")[0], mask)


def test_the_stock_client_infers_asynchronously(stock: triton.InferenceServerClient, segmenter: Segmenter) -> None:
    """Eight requests under way at once, of one to eight images, are each answered with their own masks."""
    batches = [pictures(count) for count in range(1, 9)]
    waiting = [stock.async_infer(NAME, tensor(images), headers=auth()) for images in batches]
    for images, pending in zip(batches, waiting, strict=True):
        assert np.array_equal(pending.get_result(timeout=60).as_numpy("mask"), own_masks(segmenter, images))


def test_confidence_is_given_where_it_is_asked_for(stock: triton.InferenceServerClient, segmenter: Segmenter) -> None:
    """Named in the outputs, `confidence` comes beside the mask, in the order asked for; else it does not come."""
    images = pictures(2)
    outputs = [triton.InferRequestedOutput(name, binary_data=name == "mask") for name in ("confidence", "mask")]
    result = stock.infer(NAME, tensor(images), outputs=outputs, headers=auth())
    answers = [asyncio.run(segmenter.segment(image, Ask(confidence=True))) for image in images]
    assert [output["name"] for output in result.get_response()["outputs"]] == ["confidence", "mask"]
    assert np.array_equal(result.as_numpy("confidence"), np.stack([answer.confidence for answer in answers]))
    assert np.array_equal(result.as_numpy("mask"), np.stack([answer.mask for answer in answers]))
    assert stock.infer(NAME, tensor(images), headers=auth()).as_numpy("confidence") is None


@pytest.mark.parametrize(
    ("model", "version", "sentence"),
    [("other", "", "there is no model 'other' here"), (NAME, "8", "there is no version '8' of 'brightness' here")],
)
def test_the_stock_client_is_told_of_an_unknown_model(
    stock: triton.InferenceServerClient, model: str, version: str, sentence: str
) -> None:
    """Another name or version is a 404 whose sentence reaches the client's exception, wherever it is asked for."""
    calls = [
        lambda: stock.infer(model, tensor(pictures(1)), version, headers=auth()),
        lambda: stock.get_model_metadata(model, version, headers=auth()),
        lambda: stock.get_model_config(model, version, headers=auth()),
    ]
    for call in calls:
        with pytest.raises(InferenceServerException, match=sentence) as raised:
            call()
        assert raised.value.status() == "404"


def test_the_stock_client_needs_the_key(stock: triton.InferenceServerClient) -> None:
    """Without the key neither the model's tensors nor its answers are given; a wrong one is as good as none."""
    for headers in (None, {"X-API-Key": "wrong"}):
        calls = [
            lambda headers=headers: stock.infer(NAME, tensor(pictures(1)), headers=headers),
            lambda headers=headers: stock.get_model_metadata(NAME, headers=headers),
            lambda headers=headers: stock.get_model_config(NAME, headers=headers),
        ]
        for call in calls:
            with pytest.raises(InferenceServerException, match="key") as raised:
                call()
            assert raised.value.status() == "401"


@pytest.mark.parametrize("way", ["gzip", "deflate"])
def test_compression(stock: triton.InferenceServerClient, way: str) -> None:
    """A compressed request is a 415 that says so; a compressed answer may be wished for and comes as it is."""
    with pytest.raises(InferenceServerException, match="must not be compressed") as raised:
        stock.infer(NAME, tensor(pictures(1)), request_compression_algorithm=way, headers=auth())
    assert raised.value.status() == "415"
    result = stock.infer(NAME, tensor(pictures(1)), response_compression_algorithm=way, headers=auth())
    assert result.as_numpy("mask").shape == (1, 16, 24)
