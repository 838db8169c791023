"""The interface's description: every format and parameter is in it, with examples that fit it."""

from __future__ import annotations

from collections.abc import Iterator

import jsonschema
import pytest

from serve.answers import FORMATS
from serve.schemas import ImageBody, SegmentationBody, SegmentBody
from tests.unit.serve.reader import (
    Reader,
    client_of,
)
from tests.unit.serve.uploads import Client


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of the app over the reading model."""
    with client_of(Reader()) as client:
        yield client


def test_openapi_names_every_format_and_parameter(client: Client) -> None:
    """The schema has each format by name and media type, and an example for every parameter that fits its schema."""
    schema = client.get("/openapi.json").json()
    segment = schema["paths"]["/v1/segment"]["post"]
    parameters = {entry["name"]: entry for entry in segment["parameters"]}
    assert set(parameters) == {"format", "classes", "include", "confidence", "opacity", "input", "accept"}
    content = segment["responses"]["200"]["content"]
    for name, form in FORMATS.items():
        assert name in parameters["format"]["schema"]["enum"]
        assert form.description in parameters["format"]["description"]
        assert set(form.media_types) <= set(content)
    assert "application/zip" in content
    for entry in parameters.values():
        examples = entry["schema"]["examples"]
        assert examples, entry["name"]
        for value in examples:
            jsonschema.validate(value, {**entry["schema"], "components": schema["components"]})
    assert segment["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["image"]["maxItems"] == 16


def test_openapi_has_true_examples_of_every_json_answer(client: Client) -> None:
    """The examples of each JSON format, of all that may be included and of several images fit the answer's schema."""
    schema = client.get("/openapi.json").json()
    content = schema["paths"]["/v1/segment"]["post"]["responses"]["200"]["content"]["application/json"]
    examples = {name: entry["value"] for name, entry in content["examples"].items()}
    of_json = {f"format={name}" for name, form in FORMATS.items() if "application/json" in form.media_types}
    assert of_json < set(examples)
    for value in examples.values():
        jsonschema.validate(value, {**content["schema"], "components": schema["components"]})
    SegmentationBody.model_validate(examples["format=json"])
    assert [SegmentBody(**row).label for row in examples["format=hf"]] == ["road", "car"]
    full = examples["include=rle,polygons,mask&confidence=true"]
    assert all(SegmentationBody.model_validate(full).model_dump().values())
    assert [ImageBody(**item).status for item in examples["several images"]] == [200, 415]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"label": 3}], {**content["schema"], "components": schema["components"]})
