"""What breaks the Open Inference Protocol: refused with a sentence, and never the server's fault."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.oip_messages import HEADER
from serve.schemas import ErrorBody
from serve.segmenter import Segmenter
from tests.unit.serve.tensors import INFER, assert_error, binary, message, pictures, post
from tests.unit.serve.uploads import Client


def changed(**fields: Any) -> dict[str, Any]:
    """A good request whose input has other fields; None takes one out."""
    entry = {**message(pictures(1))["inputs"][0], **fields}
    return {"inputs": [{name: value for name, value in entry.items() if value is not None}]}


SIZE = 16 * 24 * 3
GOOD = message(pictures(1))
WITH_BYTES, BLOB = binary(pictures(1))
BAD: dict[str, tuple[object, bytes | None, str]] = {
    "no JSON": (b"{", None, "no JSON"),
    "no UTF-8": (b'{"id": "\xff"}', None, "no JSON"),
    "empty": (b"", None, "no JSON"),
    "no object": ([], None, "must be a JSON object"),
    "NaN": (json.dumps(changed(data=[float("nan")] * SIZE)).encode(), None, "NaN is no JSON number"),
    "infinity": (b'{"inputs": -Infinity}', None, "Infinity is no JSON number"),
    "deep nesting": (b"[" * 20_000 + b"]" * 20_000, None, "nested too deeply"),
    "deep nesting of objects": (b'{"inputs":' * 4000 + b"1" + b"}" * 4000, None, "nested too deeply"),
    "a number of 5000 digits": (b'{"id": ' + b"9" * 5000 + b"}", None, "no JSON"),
    "id that is no string": ({**GOOD, "id": 5}, None, "'id' must be a string"),
    "no inputs": ({}, None, "one input 'image'"),
    "inputs that are no list": ({"inputs": "image"}, None, "'inputs' must be a list"),
    "an input that is no object": ({"inputs": [1]}, None, "'inputs' must be a list"),
    "an input without a name": ({"inputs": [{}]}, None, "must have a name"),
    "two inputs": ({"inputs": [*GOOD["inputs"], {"name": "mask"}]}, None, "one input 'image'"),
    "an input twice": ({"inputs": GOOD["inputs"] * 2}, None, "twice"),
    "another input": (changed(name="photo"), None, "one input 'image'"),
    "a name that UTF-8 cannot hold": (changed(name="\ud800"), None, "one input 'image'"),
    "wrong dtype": (changed(datatype="FP32"), None, "must be UINT8"),
    "no dtype": (changed(datatype=None), None, "must be UINT8"),
    "no shape": (changed(shape=None), None, "the shape"),
    "three dimensions": (changed(shape=[16, 24, 3]), None, "the shape"),
    "negative dimensions": (changed(shape=[1, -16, -24, 3]), None, "the shape"),
    "no image": (changed(shape=[0, 16, 24, 3], data=[]), None, "the shape"),
    "fractions": (changed(shape=[1, 16.0, 24, 3]), None, "the shape"),
    "truth": (changed(shape=[True, 16, 24, 3]), None, "the shape"),
    "four channels": (changed(shape=[1, 12, 24, 4]), None, "the shape"),
    "a dimension of 100 digits": (changed(shape=[1, 10**100, 24, 3]), None, "more than 64 bits"),
    "another shape": (changed(shape=[1, 16, 25, 3]), None, "got 1152 values"),
    "more images than data": (changed(shape=[60, 16, 24, 3]), None, "got 1152 values"),
    "no data": (changed(data=None), None, "either as 'data' or"),
    "data that is text": (changed(data="AAAA"), None, "whole numbers from 0 to 255"),
    "values above 255": (changed(data=[256] * SIZE), None, "lie outside"),
    "negative values": (changed(data=[-1] * SIZE), None, "lie outside"),
    "fractions as values": (changed(data=[0.5] * SIZE), None, "some are none"),
    "truth as values": (changed(data=[True] * SIZE), None, "some are none"),
    "null as values": (changed(data=[None] * SIZE), None, "some are none"),
    "huge values": (changed(data=[10**30] * SIZE), None, "lie outside"),
    "lists of other lengths": (changed(data=[[[[0] * 3] * 23] * 16]), None, "other lengths"),
    "too shallow lists": (changed(data=[[[0] * 72] * 16]), None, "other lengths"),
    "too deep lists": (changed(data=[[[[[0] * 3] * 24] * 16]]), None, "other lengths"),
    "ragged lists": (changed(data=[[[[0, 0, 0]] * 24] * 15 + [[0] * 24]]), None, "other lengths"),
    "parameters that are no object": ({**GOOD, "parameters": []}, None, "'parameters' of the request"),
    "shared memory": (changed(data=None, parameters={"shared_memory_region": "r"}), None, "shared memory"),
    "shared memory for an output": (
        {**GOOD, "outputs": [{"name": "mask", "parameters": {"shared_memory_region": "r"}}]},
        None,
        "shared memory",
    ),
    "unknown output": ({**GOOD, "outputs": [{"name": "depth"}]}, None, "the outputs are mask and confidence"),
    "output twice": ({**GOOD, "outputs": [{"name": "mask"}] * 2}, None, "twice"),
    "classification": ({**GOOD, "outputs": [{"name": "mask", "parameters": {"classification": 3}}]}, None, "apply"),
    "binary_data that is no truth": (
        {**GOOD, "outputs": [{"name": "mask", "parameters": {"binary_data": 1}}]},
        None,
        "must be true or false",
    ),
    "binary_data_output that is no truth": ({**GOOD, "parameters": {"binary_data_output": "yes"}}, None, "true or"),
    "negative timeout": ({**GOOD, "parameters": {"timeout": -1}}, None, "'timeout' must be"),
    "unknown rule": ({**GOOD, "parameters": {"input": "crop"}}, None, "'input' must be one of native, resize, window"),
    "data and bytes": (changed(parameters={"binary_data_size": SIZE}), BLOB, "either as 'data' or"),
    "bytes that nothing names": (GOOD, BLOB, "bytes follow the JSON"),
    "too few bytes": (WITH_BYTES, BLOB[:-1], "must follow the JSON"),
    "too many bytes": (WITH_BYTES, BLOB + b"\0", "must follow the JSON"),
    "huge declared size": (changed(data=None, parameters={"binary_data_size": 2**62}), BLOB, "must be 1152"),
    "negative declared size": (changed(data=None, parameters={"binary_data_size": -1}), BLOB, "must be 1152"),
    "declared size that is text": (changed(data=None, parameters={"binary_data_size": "1152"}), BLOB, "must be 1152"),
    "a tensor without the header": (json.dumps(WITH_BYTES).encode() + BLOB, None, "no JSON"),
    "a declared size without bytes": (WITH_BYTES, None, "must follow the JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_request_is_refused_with_a_sentence(client: Client, name: str) -> None:
    """What breaks the protocol is a 400 that says which rule; nothing of it reaches the model."""
    head, blob, sentence = BAD[name]
    assert sentence in assert_error(post(client, head, blob), 400, "malformed_request")


@pytest.mark.parametrize("value", ["-1", "+5", "1e3", "0x10", "many", "", "9" * 30, "99999", b"\xb2".decode("latin-1")])
def test_a_header_length_that_is_none_is_refused(client: Client, value: str) -> None:
    """The length of the JSON must be a plain number, at most the body's."""
    text = json.dumps(WITH_BYTES).encode()
    answer = client.post(INFER, content=text + BLOB, headers={HEADER.encode(): value.encode("latin-1")})
    assert HEADER in assert_error(answer, 400, "malformed_request")


LARGE = {
    "a shape of gigabytes": (changed(shape=[1, 2**40, 2**20, 3]), None, "image_too_large"),
    "a side above the limit": (changed(shape=[1, 1, 201, 3]), None, "image_too_large"),
    "pixels above the limit": (changed(shape=[1, 100, 51, 3]), None, "image_too_large"),
    "too many images": (changed(shape=[65, 1, 1, 3], data=[0] * 195), None, "too_many_images"),
    "too large a body": (WITH_BYTES, b"\0" * 50_001, "body_too_large"),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_is_refused(client: Client, name: str) -> None:
    """Pixels by the declared shape alone, images, and bytes above the limits are a 413."""
    head, blob, kind = LARGE[name]
    assert_error(post(client, head, blob), 413, kind)


def test_bytes_are_counted_while_they_come(client: Client) -> None:
    """A body without a declared length is cut off at the limit, however much would follow."""
    sent = []

    async def endless() -> Any:
        while len(sent) < 1000:
            sent.append(1)
            yield b"\0" * 10_000

    assert_error(client.post(INFER, content=endless()), 413, "body_too_large")
    assert len(sent) < 20


def test_json_is_bounded_on_its_own(segmenter: Segmenter) -> None:
    """More than 8 MiB of JSON, sent or asked for, is a 413 that names the binary form."""
    uploads = UploadLimits(max_bytes=30 * 2**20)
    image = np.zeros((1, 2100, 1000, 3), np.uint8)
    with Client(create_app(segmenter, ApiSettings(uploads))) as client:
        long = b'{"id": "' + b"x" * (8 * 2**20) + b'"}'
        assert "as binary" in assert_error(post(client, long), 413, "body_too_large")
        head, blob = binary(image)
        assert "binary_data_output" in assert_error(post(client, head, blob), 413, "answer_too_large")


# What a careless or hostile client may put where something else belongs.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 3, 16, 24, 255, 256, SIZE, 2**31, 2**63, 1e308, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["image", "mask", "confidence", "UINT8", "FP32", "BYTES", "\ud800", "binary_data_size"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in the request a value stands; of the numbers of `data` only the first."""
    found = [at]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:4]) if isinstance(tree, list) else ()
    for key, child in children:
        found += places(child, (*at, key))
    return found


def mutated(draw: st.DrawFn, head: Any) -> Any:
    """`head` with one value put elsewhere, replaced, added or taken out."""
    at = draw(st.sampled_from(places(head)[1:] or [()]))
    if not at:
        return draw(values)
    head = json.loads(json.dumps(head))
    owner = head
    for key in at[:-1]:
        owner = owner[key]
    what = draw(st.sampled_from(["replace", "delete", "add"]))
    if what == "replace":
        owner[at[-1]] = draw(values)
    elif what == "delete":
        del owner[at[-1]]
    elif isinstance(owner, dict):
        name = draw(st.sampled_from(["id", "data", "parameters", "outputs", "binary_data", "timeout", "input", "x"]))
        owner[name] = draw(values)
    else:
        owner.append(draw(values))
    return head


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, dict[bytes, bytes]]:
    """A valid request in one of its forms, changed in up to three places of its JSON, its bytes or its headers."""
    outputs = draw(st.sampled_from([[], [{"name": "mask", "parameters": {"binary_data": True}}]]))
    extra = {"outputs": outputs, "parameters": {"binary_data_output": draw(st.booleans())}}
    form = draw(st.sampled_from(["flat", "nested", "binary"]))
    head, blob = binary(pictures(1), **extra) if form == "binary" else (message(pictures(1), **extra), b"")
    if form == "nested":
        head["inputs"][0]["data"] = pictures(1).tolist()
    for _ in range(draw(st.integers(0, 3))):
        head = mutated(draw, head)
    text = json.dumps(head).encode()
    headers = {HEADER.encode(): str(len(text)).encode()} if form == "binary" else {}
    body = text + blob
    if draw(st.integers(0, 4)) == 4:
        start = draw(st.integers(0, len(body)))
        body = body[:start] + draw(st.binary(max_size=6)) + body[start + draw(st.integers(0, 40)) :]
    if draw(st.integers(0, 4)) == 4:
        headers[HEADER.encode()] = draw(
            st.one_of(
                st.integers(-2, 60_000).map(lambda n: str(n).encode()),
                st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=6).map(str.encode),
            )
        )
    return body, headers


@settings(max_examples=300)
@given(request=requests())
def test_whatever_is_sent_is_answered(client: Client, request: tuple[bytes, dict[bytes, bytes]]) -> None:
    """Changed at random, a request is answered or refused with a sentence; nothing is the server's fault."""
    body, headers = request
    answer = client.post(INFER, content=body, headers=headers)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    if answer.status_code != 200:
        assert ErrorBody.model_validate_json(answer.content).error
