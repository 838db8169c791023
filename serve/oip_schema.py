"""OpenAPI of /infer: what FastAPI cannot see, as the route reads its body itself."""

from __future__ import annotations

from typing import Any, get_args

from serve.oip_messages import CHANNELS, DATATYPE, HEADER, INPUT, MASK, MAX_IMAGES, OUTPUTS
from serve.routes.errors import ERRORS
from serve.schemas import ErrorBody, InputRule

_SIDE = {"type": "integer", "minimum": 1}
_BYTE = {"type": "integer", "minimum": 0, "maximum": 255}
_SIZE = {"type": "integer", "description": "bytes of this tensor behind the JSON, in place of `data`"}
_INPUT = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"const": INPUT},
        "datatype": {"const": DATATYPE},
        "shape": {
            "type": "array",
            "prefixItems": [{**_SIDE, "maximum": MAX_IMAGES}, _SIDE, _SIDE, {"const": CHANNELS}],
            "minItems": 4,
            "maxItems": 4,
            "description": "images, height, width, channels",
        },
        "data": {"type": "array", "description": "numbers, flat or nested as the shape says"},
        "parameters": {"type": "object", "properties": {"binary_data_size": _SIZE}},
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"enum": list(OUTPUTS)},
        "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "description": "comes back with the answer"},
        "parameters": {
            "type": "object",
            "properties": {
                "binary_data_output": {"type": "boolean", "description": "outputs as bytes behind the JSON"},
                "timeout": {"type": "integer", "minimum": 0, "description": "microseconds; 0: none"},
                "input": {"enum": list(get_args(InputRule)), "description": "as at /v1/segment"},
            },
        },
        "inputs": {"type": "array", "items": _INPUT, "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": _OUTPUT, "description": f"none: `{MASK}`"},
    },
}
_ANSWERED = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"enum": list(OUTPUTS)},
        "datatype": {"const": DATATYPE},
        "shape": {"type": "array", "items": _SIDE, "minItems": 3, "maxItems": 3},
        "data": {"type": "array", "items": _BYTE},
        "parameters": {"type": "object", "properties": {"binary_data_size": _SIZE}},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _ANSWERED},
    },
}
_ASKED: dict[str, Any] = {"name": INPUT, "datatype": DATATYPE, "shape": [1, 8, 8, CHANNELS], "data": [0] * 192}
_TOLD: dict[str, Any] = {"name": MASK, "datatype": DATATYPE, "shape": [1, 8, 8], "data": [0] * 64}
_BYTES = {"schema": {"type": "string", "format": "binary"}}


def infer() -> dict[str, Any]:
    """What the route's decorator takes beside its path."""
    asked = {"application/json": {"schema": _REQUEST, "example": {"inputs": [_ASKED], "outputs": [{"name": MASK}]}}}
    answer = {"model_name": "street", "model_version": "7", "outputs": [_TOLD]}
    told = {"application/json": {"schema": _ANSWER, "example": answer}, "application/octet-stream": _BYTES}
    header = {"name": HEADER, "in": "header", "schema": {"type": "integer"}, "description": "bytes of JSON"}
    return {
        "responses": {
            **{status: ERRORS[status] for status in (401, 413, 422, 429, 503, 504)},
            400: {"model": ErrorBody, "description": "the request breaks the protocol"},
            404: {"model": ErrorBody, "description": "another model is served"},
            415: {"model": ErrorBody, "description": "the body is compressed"},
            200: {"content": told, "description": "the masks, as JSON or as JSON and bytes"},
        },
        "openapi_extra": {
            "requestBody": {"required": True, "content": {**asked, "application/octet-stream": _BYTES}},
            "parameters": [header],
        },
    }
