"""The access log: one JSON line a request that says how it went, and holds nothing that could be a secret."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sceneray.errors import ServingError
from serve import keys
from serve.access_log import NAME
from serve.api import ApiSettings, create_app
from serve.visit import MAX_REQUEST_ID, clean_request_id
from tests.support import ROOT
from tests.unit.serve.servers import Still
from tests.unit.serve.uploads import Client, encoded

PNG = encoded(Image.new("RGB", (40, 25), (90, 90, 90)), "PNG")
SECRET = "hunter2-hunter2"
FIELDS = {
    *("time", "request_id", "method", "path", "status", "error_type", "key"),
    *("bytes_in", "bytes_out", "pixels", "model", "ms"),
}


@pytest.fixture(autouse=True)
def _shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The access log so far."""
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == NAME]


def test_a_request_is_one_line_that_says_how_it_went(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Who, what, how much, by which model, and how long each stage took."""
    file = tmp_path / "keys.json"
    file.write_bytes(keys.to_json([keys.Key(id="alice", sha256=keys.digest_of(SECRET))]))
    with Client(create_app(Still(), ApiSettings(keys_file=str(file)))) as client:
        headers = {"X-API-Key": SECRET, "Content-Type": "image/png", "x-request-id": "mine-1"}
        answer = client.post("/v1/segment", content=PNG, headers=headers)
    (line,) = lines(caplog)
    assert set(line) == FIELDS
    assert (line["status"], line["error_type"], line["key"]) == (200, None, "alice")
    assert (line["method"], line["path"], line["request_id"]) == ("POST", "/v1/segment", "mine-1")
    assert (line["bytes_in"], line["bytes_out"], line["pixels"]) == (len(PNG), len(answer.content), 1000)
    assert line["model"] == "1"
    assert {"header", "decode", "encode", "total"} <= set(line["ms"])


def test_a_refusal_is_a_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Refused by key, by size, by content, and by path: each line has the status and error type of the answer."""
    app = create_app(Still(), ApiSettings(key_digests=(keys.digest_of(SECRET),)))
    with Client(app) as client:
        mine = {"X-API-Key": SECRET}
        answers = [
            client.post("/v1/segment", content=PNG),
            client.post("/v1/segment", content=b"no image", headers=mine),
            client.get("/nowhere"),
            client.request("BREW", "/v1/segment", headers=mine),
        ]
    found = lines(caplog)
    assert [line["status"] for line in found] == [401, 415, 404, 405] == [a.status_code for a in answers]
    assert [line["error_type"] for line in found] == [a.json()["error_type"] for a in answers]
    assert [line["key"] for line in found] == [None, "key-1", None, None]
    assert [line["path"] for line in found] == ["/v1/segment", "/v1/segment", None, "/v1/segment"]
    assert found[3]["method"] == "other"


def test_a_failing_model_is_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    """A 500 stands in the access log, and its reason in the other log under the same id."""

    class Failing(Still):
        async def segment(self, image: Any, ask: Any) -> Any:  # noqa: ARG002
            raise RuntimeError("the reason")

    with Client(create_app(Failing(), ApiSettings())) as client:
        answer = client.post("/v1/segment", content=PNG)
    (line,) = lines(caplog)
    assert (line["status"], line["error_type"]) == (500, "internal_error")
    assert answer.json()["request_id"] == line["request_id"]
    (error,) = [record for record in caplog.records if record.name == "sceneray.serve"]
    assert line["request_id"] in error.getMessage()
    assert "the reason" in error.exc_text or "the reason" in str(error.exc_info[1])


def test_a_model_that_cannot_answer_now_is_a_503() -> None:
    """What the model itself says of why is told, with the time to come back."""

    class Unable(Still):
        async def segment(self, image: Any, ask: Any) -> Any:  # noqa: ARG002
            raise ServingError("the model is being replaced.")

    with Client(create_app(Unable(), ApiSettings())) as client:
        answer = client.post("/v1/segment", content=PNG)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_secret_sent_everywhere_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Key, header, query, path, method, form field, file name, cookie, image: none of it is in any log line."""
    app = create_app(Still(), ApiSettings(key_digests=(keys.digest_of(SECRET),)))
    headers = {
        "Authorization": f"Bearer {SECRET}",
        "X-API-Key": SECRET,
        "Cookie": f"session={SECRET}",
        "User-Agent": SECRET,
        "Referer": f"http://x/?{SECRET}",
        "Accept": f"image/png, x/{SECRET}",
        "x-request-timeout-s": SECRET,
    }
    form = {"image": (f"{SECRET}.png", PNG, f"image/{SECRET}"), SECRET: ("x", SECRET.encode())}
    with Client(app) as client:
        for sent in (headers, {"Authorization": f"Bearer {SECRET}"}, {"X-API-Key": f"wrong {SECRET}"}):
            for path in ("/v1/segment", "/predict", f"/v1/segment?key={SECRET}&view={SECRET}", f"/{SECRET}"):
                client.post(path, files=form, headers=sent)
                client.post(path, content=PNG + SECRET.encode(), headers={**sent, "Content-Type": f"image/{SECRET}"})
                client.post(path, json={SECRET: SECRET}, headers=sent)
            client.request(SECRET, "/v1/segment", headers=sent)
            client.get(f"/v2/models/{SECRET}/versions/{SECRET}/ready")
    ours = [record for record in caplog.records if record.name.startswith(("sceneray", "serve"))]
    assert len(lines(caplog)) == 3 * (4 * 3 + 2)
    assert not [record for record in ours if SECRET in record.getMessage()]


def test_it_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    """With access_log off there is no line."""
    with Client(create_app(Still(), ApiSettings(access_log=False))) as client:
        client.get("/livez")
    assert lines(caplog) == []


def test_a_replicas_lines_stand_on_its_stdout() -> None:
    """`to_stdout`, called twice, writes each line once, and nothing but the JSON."""
    code = (
        "import logging; from serve import access_log; access_log.to_stdout(); access_log.to_stdout();"
        "logging.getLogger('sceneray.access').info('{}')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"


@given(st.text(max_size=300))
def test_a_callers_request_id_is_made_harmless(given_id: str) -> None:
    """Whatever is sent: short, without spaces, quotes, line ends or control characters; never empty."""
    clean = clean_request_id(given_id)
    assert 1 <= len(clean) <= MAX_REQUEST_ID
    assert clean.isascii()
    assert not set(clean) & set(" \t\r\n\"'<>\\\x1b{}")


def test_the_request_id_is_echoed_as_it_was_made_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """Header, body and log have the same id; behind a proxy, which echoes it itself, the header is not ours to set."""
    for proxied in (False, True):
        with Client(create_app(Still(), ApiSettings(proxied=proxied))) as client:
            answer = client.get("/nowhere")
            named = client.request("GET", "/nowhere", headers={"x-request-id": "a b\x1b[31m<i>"})
        assert answer.headers["x-request-id"] == answer.json()["request_id"]
        assert named.json()["request_id"] == "ab31mi" == lines(caplog)[-1]["request_id"]
        assert named.headers.get("x-request-id") == (None if proxied else "ab31mi")


def test_answers_tell_browsers_to_be_careful() -> None:
    """Every answer, errors included: no guessed types, no frames, nothing loaded from elsewhere; CORS off."""
    with Client(create_app(Still(), ApiSettings())) as client:
        for path in ("/livez", "/nowhere", "/docs", "/"):
            answer = client.request("GET", path, headers={"Origin": "https://app.example.org"})
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert "access-control-allow-origin" not in answer.headers


def test_cors_is_for_named_origins_and_covers_refusals() -> None:
    """A named origin may read answers, the 401 included, and ask first; another may not."""
    settings = ApiSettings(key_digests=("ab" * 32,), cors_origins=("https://app.example.org",))
    with Client(create_app(Still(), settings)) as client:
        for origin, allowed in (("https://app.example.org", "https://app.example.org"), ("https://evil.example", None)):
            answer = client.request("POST", "/v1/segment", content=PNG, headers={"Origin": origin})
            assert answer.status_code == 401
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in answer.headers
        asked = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "x-api-key"
        assert client.request("OPTIONS", "/v1/segment", headers=asked).status_code == 200
