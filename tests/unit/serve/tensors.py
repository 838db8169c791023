"""For the tests of the Open Inference Protocol: pictures, requests in JSON and in bytes, and what is said to them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np

from sceneray.masks import Photo
from serve.admission import UploadLimits
from serve.batching import Limits
from serve.oip_messages import HEADER
from serve.schemas import ErrorBody, Segmented
from serve.segmenter import Segmenter
from tests.unit.serve.uploads import Client

LIMITS = Limits(max_items=4, max_cost=100_000, max_queued_cost=200_000, max_wait_s=0.001)
UPLOADS = UploadLimits(max_bytes=50_000, max_pixels=5000, max_side=200)
NAME, INFER = "brightness", "/v2/models/brightness/infer"


def pictures(count: int) -> Photo:
    """uint8 [count, 16, 24, 3], no two alike."""
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)


def message(images: Photo, **fields: Any) -> dict[str, Any]:
    """A request whose tensor is JSON numbers, flat."""
    entry = {"name": "image", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [entry], **fields}


def binary(images: Photo, **fields: Any) -> tuple[dict[str, Any], bytes]:
    """A request whose tensor follows as bytes, and these."""
    entry = message(images)["inputs"][0]
    del entry["data"]
    return {"inputs": [{**entry, "parameters": {"binary_data_size": images.size}}], **fields}, images.tobytes()


def post(client: Client, head: object, blob: bytes | None = None, path: str = INFER, **headers: str) -> Any:
    """A request of JSON and, where there is a `blob`, of the bytes behind it."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    named = {HEADER: str(len(text))} if blob is not None else {}
    return client.post(path, content=text + (blob or b""), headers=named | headers)


def masks_of(answer: Any) -> np.ndarray:
    """The masks of an answer in JSON."""
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], np.uint8).reshape(output["shape"])


def assert_error(answer: Any, status: int, kind: str) -> str:
    """The answer is a JSON error of that status and kind with a sentence, which is returned."""
    assert answer.status_code == status, answer.text
    body = ErrorBody.model_validate_json(answer.content)
    assert (body.error_type, body.request_id) == (kind, answer.headers["x-request-id"])
    assert body.error.endswith(".")
    return body.error


def own_masks(segmenter: Segmenter, images: Photo) -> np.ndarray:
    """What the segmenter answers to each image alone, uint8 [N, H, W]."""

    async def all_of_them() -> list[Segmented]:
        return [await segmenter.segment(image) for image in images]

    return np.stack([answer.mask for answer in asyncio.run(all_of_them())])
