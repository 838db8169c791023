"""Inference requests of the Open Inference Protocol v2 over HTTP, with its binary tensor extension.

    POST /v2/models/NAME/infer
    Inference-Header-Content-Length: J      absent: the whole body is JSON
    J bytes of JSON {"id", "parameters", "inputs": [...], "outputs": [...]}, then the tensors' bytes

Sources: kserve/open-inference-protocol, specification/protocol/inference_rest.md; triton-inference-server/server,
docs/protocol/extension_binary_data.md. Nothing of HTTP but the refusals; nothing here waits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, cast, get_args

import numpy as np

from sceneray.masks import Photo
from serve.admission import Refused, UploadLimits
from serve.schemas import InputRule

INPUT, MASK, CONFIDENCE = "image", "mask", "confidence"
HEADER = "Inference-Header-Content-Length"
OUTPUTS = (MASK, CONFIDENCE)
DATATYPE = "UINT8"
CHANNELS = 3
# JSON costs a server far more than the bytes it stands for: 8 MiB of numbers take 0.1 s during which nothing else in
# the process runs, and 8 MiB of empty lists take 170 MiB (measured on CPython 3.11).
MAX_JSON_BYTES = 8 * 2**20
# The images of one request. Each is a task of its own, so that pixels and bytes alone would not bound them.
MAX_IMAGES = 64
_SHOWN = 60  # characters of what came that an error repeats


@dataclass(frozen=True)
class Wanted:
    """One output that a request asks for: its name, and whether as bytes behind the JSON."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A checked request. `images` is uint8 [N, H, W, 3]; None: the caller named none."""

    id: str | None
    images: Photo
    wanted: tuple[Wanted, ...]
    timeout_s: float | None = None
    input: InputRule | None = None


def json_length(header: str | None, body_length: int, limits: UploadLimits) -> int:
    """How many of the body's first bytes are JSON, by the header Inference-Header-Content-Length (None: all of them).

    Raises Refused: 400 for a header that is no such number, 413 for more JSON than is read.
    """
    length = body_length
    if header is not None:
        text = header.strip()
        if not (text.isascii() and text.isdecimal() and len(text) <= 20):
            _malformed(f"{HEADER} must be a number of bytes, got {shown(header)}.")
        length = int(text)
        if length > body_length:
            _malformed(f"{HEADER} says {length} bytes of JSON, but the body has {body_length}.")
    most = min(MAX_JSON_BYTES, limits.max_bytes)
    if length > most:
        text = f"a request may have {most} bytes of JSON, got {length}: send the tensor as binary."
        raise Refused(413, "body_too_large", text, detail={"max_json_bytes": most, "json_bytes": length})
    return length


def parse(body: bytes, length: int, limits: UploadLimits) -> InferRequest:
    """The request of a body whose first `length` bytes are JSON.

    `images` shares memory with `body` where the tensor is binary. Slow for much JSON: call it off the event loop.
    Raises Refused: 400 for what breaks the protocol, 413 for images above the limits.
    """
    message = _json_object(body[:length])
    parameters = _parameters(message, "the request")
    request_id = message.get("id")
    if request_id is not None and not isinstance(request_id, str):
        _malformed(f"'id' must be a string, got {shown(request_id)}.")
    entry = _only_input(message)
    shape = _shape(entry, limits)
    tensor = memoryview(body)[length:]
    images = _values(entry, shape, tensor)
    return InferRequest(
        request_id, images, _wanted(message, parameters), _timeout_s(parameters), _input_rule(parameters)
    )


def shown(value: object) -> str:
    """What came, short and in ASCII, for a message: JSON may hold what UTF-8 cannot (half a surrogate pair)."""
    text = ascii(value[:_SHOWN]) if isinstance(value, str) else ascii(value) if _is_plain(value) else _kind(value)
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."


def _is_plain(value: object) -> bool:
    # A long integer cannot even be printed (CPython's limit of 4300 digits), so it is not tried.
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= 64)


def _kind(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", dict: "an object", int: "a number of more than 64 bits"}
    return kinds.get(type(value), type(value).__name__)


def _malformed(sentence: str) -> NoReturn:
    raise Refused(400, "malformed_request", sentence)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text.decode(), parse_constant=_no_constant)
    except RecursionError as error:
        raise Refused(400, "malformed_request", "the request's JSON is nested too deeply.") from error
    except ValueError as error:  # of UTF-8, of JSON, and of numbers too long to read
        raise Refused(400, "malformed_request", f"the request is no JSON: {error}.") from error
    if not isinstance(message, dict):
        _malformed(f"the request must be a JSON object, got {shown(message)}.")
    return message


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parameters(owner: dict[str, Any], what: str) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        _malformed(f"'parameters' of {what} must be an object, got {shown(parameters)}.")
    # The tensors would lie in a memory that this server shares with nobody.
    if "shared_memory_region" in parameters:
        _malformed(f"{what} names a shared memory region, which this server does not have: send the tensor itself.")
    return parameters


def _flag(parameters: dict[str, Any], name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        _malformed(f"the parameter '{name}' must be true or false, got {shown(value)}.")
    return value


def _timeout_s(parameters: dict[str, Any]) -> float | None:
    """Seconds of the parameter `timeout`, which is in microseconds; 0 means none, as with Triton."""
    value = parameters.get("timeout", 0)
    if not _is_count(value):
        _malformed(f"the parameter 'timeout' must be a whole number of microseconds, got {shown(value)}.")
    return value / 1e6 if value else None


def _input_rule(parameters: dict[str, Any]) -> InputRule | None:
    """The parameter `input`, as /v1/segment has it: how an image becomes the network's input."""
    value = parameters.get("input")
    if value is not None and value not in get_args(InputRule):
        _malformed(f"the parameter 'input' must be one of {', '.join(get_args(InputRule))}, got {shown(value)}.")
    return cast("InputRule | None", value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _named(owner: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """The entries of `inputs` or `outputs`: objects with a name, each name once."""
    entries = owner.get(group, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        _malformed(f"'{group}' must be a list of objects, got {shown(entries)}.")
    names = [entry.get("name") for entry in entries]
    for name in names:
        if not isinstance(name, str):
            _malformed(f"each of '{group}' must have a name, got {shown(name)}.")
    if len(set(names)) < len(names):
        _malformed(f"'{group}' names a tensor twice.")
    return entries


def _only_input(message: dict[str, Any]) -> dict[str, Any]:
    entries = _named(message, "inputs")
    if len(entries) != 1 or entries[0]["name"] != INPUT:
        names = ", ".join(shown(entry["name"]) for entry in entries[:8]) or "none"
        _malformed(f"one input '{INPUT}' is expected, got: {names}.")
    entry = entries[0]
    if entry.get("datatype") != DATATYPE:
        _malformed(f"the datatype of '{INPUT}' must be {DATATYPE}, got {shown(entry.get('datatype'))}.")
    return entry


def _shape(entry: dict[str, Any], limits: UploadLimits) -> tuple[int, int, int, int]:
    shape = entry.get("shape")
    rule = f"the shape of '{INPUT}' must be [images, height, width, {CHANNELS}], whole numbers above 0"
    if not isinstance(shape, list) or len(shape) != 4:
        _malformed(f"{rule}, got {f'{len(shape)} numbers' if isinstance(shape, list) else shown(shape)}.")
    if not all(_is_count(side) and side for side in shape) or shape[3] != CHANNELS:
        _malformed(f"{rule}, got [{', '.join(shown(side) for side in shape)}].")
    images, height, width, _ = shape
    if max(height, width) > limits.max_side or height * width > limits.max_pixels:
        raise Refused(
            413,
            "image_too_large",
            f"an image may have {limits.max_pixels} pixels and {limits.max_side} a side, got {height} × {width} "
            "(height × width): send it scaled down.",
            detail={"max_pixels": limits.max_pixels, "max_side": limits.max_side},
        )
    if images > MAX_IMAGES:
        text = f"a request may have {MAX_IMAGES} images, got {images}: send several requests."
        raise Refused(413, "too_many_images", text, detail={"max_images": MAX_IMAGES, "images": images})
    return images, height, width, CHANNELS


def _values(entry: dict[str, Any], shape: tuple[int, int, int, int], tensor: memoryview) -> Photo:
    """The input's values as uint8 of `shape`; `tensor` is what follows the JSON. Its size is checked before."""
    size = shape[0] * shape[1] * shape[2] * shape[3]
    declared = _parameters(entry, f"'{INPUT}'").get("binary_data_size")
    if (declared is None) == ("data" not in entry):
        _malformed(f"'{INPUT}' needs its values either as 'data' or as the parameter binary_data_size.")
    if declared is None:
        if len(tensor):
            _malformed(f"{len(tensor)} bytes follow the JSON, but no input has the parameter binary_data_size.")
        return np.frombuffer(_flat(entry["data"], shape, size), np.uint8).reshape(shape)
    if not _is_count(declared) or declared != size:
        _malformed(f"binary_data_size of '{INPUT}' must be {size} for the shape {list(shape)}, got {shown(declared)}.")
    if len(tensor) != size:
        _malformed(
            f"{size} bytes must follow the JSON for the shape {list(shape)}, got {len(tensor)}. The header "
            f"{HEADER} says where the JSON ends."
        )
    return np.frombuffer(tensor, np.uint8).reshape(shape)


def _flat(data: object, shape: Sequence[int], size: int) -> bytes:
    """The numbers of `data`, one flat list or lists nested as `shape` says."""
    rule = f"'data' must be {size} whole numbers from 0 to 255, one flat list or nested as the shape {list(shape)} says"
    if not isinstance(data, list):
        _malformed(f"{rule}; got {shown(data)}.")
    values = data
    if values and isinstance(values[0], list):
        if len(values) != shape[0]:
            _malformed(f"{rule}; its outer list has {len(values)} entries.")
        for length in shape[1:]:
            if not _all_of(values, list) or set(map(len, values)) != {length}:
                _malformed(f"{rule}; its lists have other lengths.")
            values = list(chain.from_iterable(values))
    if len(values) != size:
        _malformed(f"{rule}; got {len(values)} values.")
    if not _all_of(values, int):
        _malformed(f"{rule}; some are none.")
    try:
        return bytes(values)
    except ValueError:
        _malformed(f"{rule}; some lie outside.")


def _all_of(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) == {kind}  # exactly: a bool is an int to isinstance


def _wanted(message: dict[str, Any], parameters: dict[str, Any]) -> tuple[Wanted, ...]:
    """The outputs asked for; none named: the mask alone."""
    binary = _flag(parameters, "binary_data_output", otherwise=False)
    return tuple(_output(entry, binary) for entry in _named(message, "outputs")) or (Wanted(MASK, binary),)


def _output(entry: dict[str, Any], binary: bool) -> Wanted:
    name = entry["name"]
    if name not in OUTPUTS:
        _malformed(f"the outputs are {' and '.join(OUTPUTS)}, got {shown(name)}.")
    parameters = _parameters(entry, f"'{name}'")
    if parameters.get("classification"):
        _malformed(f"'{name}' holds a class for each pixel; the parameter 'classification' does not apply to it.")
    return Wanted(name, _flag(parameters, "binary_data", binary))
