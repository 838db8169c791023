"""Requests drawn from the OpenAPI itself: whatever the schema allows, and what it does not, no server error comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation.modes import GenerationMode

from serve.admission import UploadLimits
from serve.api import ApiSettings, create_app
from serve.batching import Limits
from serve.schemas import ErrorBody
from serve.segmenter import Segmenter
from tests.bundles import write_bundle

LIMITS = Limits(max_items=4, max_cost=400_000, max_queued_cost=800_000, max_wait_s=0.0)
UPLOADS = UploadLimits(max_bytes=200_000, max_pixels=100_000, max_side=1000)
EXAMPLES = 15  # of each operation, once as the schema says and once against it
SERVED = {"name": "brightness", "version": "7"}
# A status that says whose fault it is and what to do; 500 and 502 say neither.
RIGHTFUL = (503, 504)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """The app over a real model."""
    segmenter = Segmenter.load(write_bundle(str(tmp_path_factory.mktemp("bundle"))), LIMITS, "cpu")
    return create_app(segmenter, ApiSettings(UPLOADS, deadline_s=20))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_of_the_schema_is_a_server_error(app: FastAPI, mode: GenerationMode) -> None:
    """Every operation, with drawn parameters, headers and bodies: an answer below 500, and errors in their shape."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    counts: Counter[int] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/segment", "/predict", "/v1/model"} <= {operation.path for operation in operations}
    for operation in operations:

        @seed(4)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), is_served=st.booleans())
        def check(case: schemathesis.Case, is_served: bool) -> None:
            if is_served:  # a drawn name is never the model's: half of the requests would end there
                case.path_parameters.update({name: SERVED[name] for name in case.path_parameters if name in SERVED})
            answer = case.call()
            counts[answer.status_code] += 1
            assert answer.status_code < 500 or answer.status_code in RIGHTFUL, (case.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                ErrorBody.model_validate_json(answer.content)

        try:
            check()
        except Unsatisfiable:  # nothing can be drawn against a schema that allows everything
            assert mode is GenerationMode.NEGATIVE, operation.label
    told = dict(sorted(counts.items()))
    print(f"\n{mode.value}: {sum(counts.values())} requests to {len(operations)} operations: {told}")
    assert sum(counts.values()) > 50
