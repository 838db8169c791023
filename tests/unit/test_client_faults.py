"""The Python client against a server that fails as real ones do: what is asked again, how long, and what is final."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from sceneray.client import Client
from sceneray.errors import ConfigError, DataError, ScenerayError, ServingError
from sceneray.masks import indexed_png
from tests.bundles import CLASSES
from tests.scripted_server import breaks_off, drips, drops, says, scripted
from tests.support import ROOT, free_port

JPEG = b"the bytes of a photograph, which this server never looks at"
ANSWER = {
    "width": 2,
    "height": 1,
    "classes": [{"id": 0, "name": "dark", "color": [10, 20, 30], "share": 1.0}],
    "model": {"name": "still", "version": "1"},
    "mask": base64.b64encode(indexed_png(np.zeros((1, 2), np.uint8), CLASSES)).decode(),
}
GOOD = says(200, ANSWER, x_request_id="r-9", x_model_digest="d", server_timing="model;dur=20.5, total;dur=30")


def failure(url: str, **options: Any) -> ScenerayError:
    """What one request raises."""
    with Client(url, **options) as client, pytest.raises(ScenerayError) as raised:
        client.segment(JPEG)
    return raised.value


def test_not_ready_is_no_error() -> None:
    """503 means not ready, asked once; another server's 404 is an error."""
    with scripted([says(503, b"")]) as script, Client(script.url) as client:
        assert not client.ready()
        assert len(script.requests) == 1
    with scripted([says(404, b"<html>")]) as script, Client(script.url) as client, pytest.raises(ServingError):
        client.ready()


TEMPORARY = {
    "busy": says(429, {"error": "the queue is full."}, retry_after="0"),
    "away": says(503, {"error": "no model."}, retry_after="0"),
    "away without a word": says(503, b"<html>Bad gateway"),
    "its process died, Serve's proxy says so": says(500, b"Internal Server Error"),
    "its process died, another proxy says so": says(502, b"<html>Bad gateway"),
    "dropped": drops,
    "broken off": breaks_off,
}


@pytest.mark.parametrize("name", TEMPORARY)
def test_what_passes_is_asked_again(name: str) -> None:
    """After two refusals or faults that pass the third answer is the result, and each attempt sent the whole image."""
    with scripted([TEMPORARY[name], TEMPORARY[name], GOOD]) as script, Client(script.url) as client:
        result = client.segment(JPEG)
        assert [request.body for request in script.requests] == [JPEG] * 3
    assert (result.request_id, result.model.digest) == ("r-9", "d")
    assert {stage: result.times[stage] for stage in ("model", "total")} == {"model": 0.0205, "total": 0.03}


@pytest.mark.parametrize("status", [400, 401, 404, 406, 413, 415, 422, 500, 502, 504])
def test_what_is_final_is_asked_once(status: int) -> None:
    """Any other refusal is raised at once: the image's fault as DataError, all else as ServingError."""
    refusal = says(status, {"error": "the rule, what came.", "error_type": "a_rule"}, x_request_id="r-7")
    with scripted([refusal, GOOD]) as script:
        error = failure(script.url)
        assert len(script.requests) == 1
    assert type(error) is (DataError if status in (413, 415, 422) else ServingError)
    assert str(error).endswith(f"/v1/segment answered {status}: the rule, what came. (request r-7)")


def test_the_attempts_are_bounded() -> None:
    """An endpoint that stays busy is asked as often as was said, and its last sentence raised."""
    with scripted([says(429, {"error": "the queue is full."}, retry_after="0")]) as script:
        assert "the queue is full." in str(failure(script.url, attempts=3))
        assert len(script.requests) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str) -> None:
    """The second request comes no earlier than the first answer asked for."""

    def busy(out: BinaryIO) -> None:
        # A date has whole seconds: two ahead is at least one.
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        says(429, b"", retry_after="1" if form == "seconds" else at)(out)

    with scripted([busy, GOOD]) as script, Client(script.url) as client:
        client.segment(JPEG)
    first, second = script.times
    assert second - first >= 0.9  # the two clocks need not agree to the millisecond


def test_nobody_waits_beyond_the_calls_time() -> None:
    """Told to come back after the call's own time is over, the client fails at once."""
    with scripted([says(429, {"error": "the queue is full."}, retry_after="3600"), GOOD]) as script:
        assert "the queue is full." in str(failure(script.url))
        assert len(script.requests) == 1


def test_an_answer_without_end_ends() -> None:
    """A server that sends one byte after another, each in time, is left when the call's time is over."""
    with scripted([drips]) as script:
        error = failure(script.url, timeout_s=0.5)
    assert isinstance(error, ServingError)
    assert "when the time was over" in str(error)


def test_the_endpoint_is_told_how_long_the_client_waits() -> None:
    """Each attempt names the seconds that are left of the call."""
    with scripted([drops, GOOD]) as script, Client(script.url, timeout_s=20) as client:
        client.segment(JPEG)
        first, second = (float(request.head.get("x-request-timeout-s")) for request in script.requests)
    assert 0 < second < first <= 20


def test_nobody_there_is_said_with_the_fix() -> None:
    """Where nothing listens the error names the address and how to start an endpoint."""
    port = free_port()
    error = failure(f"http://user:secret@127.0.0.1:{port}", attempts=2)
    assert f"no answer from http://127.0.0.1:{port}" in str(error)
    assert "sceneray serve" in str(error)
    assert "secret" not in str(error)


NO_MASKS = {
    "HTML": b"<html>",
    "no object": b"[]",
    "no mask": b"{}",
    "no base64": json.dumps({**ANSWER, "mask": "?"}).encode(),
    "no PNG": json.dumps({**ANSWER, "mask": "AAAA"}).encode(),
    "deep": b"[" * 20_000,
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_another_server_is_recognised(name: str) -> None:
    """A success that holds no mask is a ServingError that says so."""
    with scripted([says(200, NO_MASKS[name])]) as script:
        error = failure(script.url)
    assert isinstance(error, ServingError)
    assert "something else than a mask" in str(error)


@pytest.mark.parametrize(
    "image",
    ["no-such-file.jpg", np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), 5, None],
    ids=["missing", "floats", "four channels", "empty", "number", "none"],
)
def test_what_is_no_image_is_not_sent(image: Any) -> None:
    """A file that is not there, and arrays and objects that are no picture, are a DataError before any request."""
    with scripted([GOOD]) as script, Client(script.url) as client:
        with pytest.raises(DataError, match="image"):
            client.segment(image)
        assert script.requests == []


@pytest.mark.parametrize(
    "options",
    [{"url": "ftp://host"}, {"url": "host:8000"}, {"url": "http://"}, {"url": ""}, {"url": "http://h:port"},
     {"url": "http://h", "timeout_s": 0}, {"url": "http://h", "attempts": 0}],
    ids=str,
)  # fmt: skip
def test_a_client_that_could_not_work_is_refused(options: dict[str, Any]) -> None:
    """A URL of another scheme or none, no time and no attempts are a ConfigError."""
    with pytest.raises(ConfigError):
        Client(**options)


def test_the_client_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    """Importing it brings in neither of them, nor a web framework."""
    code = "import json, sys, sceneray.client; print(json.dumps(sorted(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "sceneray.client" in loaded
    assert not loaded & {"torch", "ray", "fastapi", "starlette", "uvicorn"}
