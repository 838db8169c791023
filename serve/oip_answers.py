"""What the Open Inference Protocol's routes answer: tensors as JSON or as bytes, and the model's description."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sceneray.masks import Mask
from serve.admission import Refused
from serve.oip_messages import CHANNELS, DATATYPE, INPUT, MASK, MAX_IMAGES, MAX_JSON_BYTES, InferRequest, Wanted
from serve.schemas import Segmented

PLATFORM = "pytorch_pspnet"
# A value takes up to 4 bytes with its comma; an answer in JSON is no larger than a request in JSON.
MAX_JSON_VALUES = MAX_JSON_BYTES // 4
# Every value with its comma, padded to 4 bytes: JSON without a Python object for each pixel.
_NUMBERS = np.array([f"{value}," for value in range(256)], "S4")


def check_size(request: InferRequest) -> None:
    """Raise Refused (413) where the outputs that are asked for as JSON would be too large."""
    values = request.images.size // CHANNELS * sum(not wanted.binary for wanted in request.wanted)
    if values > MAX_JSON_VALUES:
        raise Refused(
            413,
            "answer_too_large",
            f"an answer in JSON may have {MAX_JSON_VALUES} values, this one would have {values}: ask for binary "
            "outputs (the request's parameter binary_data_output, or binary_data of an output).",
            detail={"max_json_values": MAX_JSON_VALUES, "json_values": values},
        )


def encode(request: InferRequest, answers: Sequence[Segmented]) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part; None where all of it is JSON.

    JSON numbers are one flat list, rows first. Slow: call it off the event loop. Raises Refused (400) where the
    confidence is asked for and the model gives none.
    """
    tensors = [(wanted, _tensor(wanted.name, answers)) for wanted in request.wanted]
    model = answers[0].model
    about = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        about["id"] = request.id
    outputs = b", ".join(_output_json(wanted, tensor) for wanted, tensor in tensors)
    text = json.dumps({**about, "outputs": []})[: -len("]}")].encode() + outputs + b"]}"
    blobs = [tensor.tobytes() for wanted, tensor in tensors if wanted.binary]
    return b"".join([text, *blobs]), len(text) if blobs else None


def metadata(about: dict[str, Any]) -> dict[str, Any]:
    """The protocol's description of the model that bundle.json is `about`."""
    # Not `confidence`: a request that names no output gets all outputs of the metadata, and few want it.
    return {
        "name": about["name"],
        "versions": [about["version"]],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": [-1, -1, -1, CHANNELS]}],
        "outputs": [{"name": MASK, "datatype": DATATYPE, "shape": [-1, -1, -1]}],
    }


def config(about: dict[str, Any]) -> dict[str, Any]:
    """The model as Triton's ModelConfig, as far as it applies; there `dims` leave out the images' dimension."""
    return {
        "name": about["name"],
        "platform": PLATFORM,
        "backend": "sceneray",
        "max_batch_size": MAX_IMAGES,
        "input": [{"name": INPUT, "data_type": f"TYPE_{DATATYPE}", "dims": [-1, -1, CHANNELS]}],
        "output": [{"name": MASK, "data_type": f"TYPE_{DATATYPE}", "dims": [-1, -1]}],
    }


def _tensor(name: str, answers: Sequence[Segmented]) -> Mask:
    """uint8 [N, H, W]: one output of all answers."""
    maps = [answer.mask if name == MASK else answer.confidence for answer in answers]
    there = [found for found in maps if found is not None]
    if len(there) < len(maps):
        raise Refused(400, "no_confidence", "this model does not tell how sure it is: ask for the mask alone.")
    return np.stack(there)


def _output_json(wanted: Wanted, tensor: Mask) -> bytes:
    entry: dict[str, Any] = {"name": wanted.name, "datatype": DATATYPE, "shape": list(tensor.shape)}
    if wanted.binary:
        return json.dumps({**entry, "parameters": {"binary_data_size": tensor.size}}).encode()
    numbers = _NUMBERS[tensor].tobytes().replace(b"\0", b"")
    return json.dumps(entry)[:-1].encode() + b', "data": [' + numbers[:-1] + b"]}"
