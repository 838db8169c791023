"""Who may come in: keys by their hash, files that change while the endpoint runs, and refusals before any body."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sceneray import storage
from sceneray.errors import ConfigError
from serve import keys
from serve.api import ApiSettings, create_app
from serve.key_watch import KeyWatch
from serve.keys import Key, KeyRing
from serve.schemas import ErrorBody
from tests.unit.serve.servers import Still, uvicorn_of, wait_for
from tests.unit.serve.uploads import Client, encoded

PNG = encoded(Image.new("RGB", (40, 25), (90, 90, 90)), "PNG")
# What a stranger may see: health, the page and the documentation.
OPEN = {"/", "/page/", "/docs", "/openapi.json", "/livez", "/readyz", "/v2", "/v2/health/", "/v2/models/"}


def key(name: str, secret: str, **limits: object) -> Key:
    """The entry of `secret` in a key file."""
    return Key.model_validate({"id": name, "sha256": keys.digest_of(secret), **limits})


def write(url: str, *entries: Key) -> None:
    """A key file at `url`."""
    storage.write_bytes(url, keys.to_json(entries))


def listed(*entries: dict[str, object]) -> str:
    """A key file whose entries are good but for what is given."""
    return json.dumps({"keys": [{"id": "a", "sha256": "ab" * 32} | entry for entry in entries]})


def test_a_key_is_found_by_what_was_presented_and_by_nothing_else() -> None:
    """The key itself opens; neither its digest, nor nothing, nor another key does; an expired one no longer."""
    now = datetime.now(UTC)
    old = key("old", "gamma", expires=(now + timedelta(seconds=1)).isoformat())
    ring = KeyRing((key("a", "alpha"), key("b", "beta"), old))
    assert [ring.find(secret).id for secret in ("alpha", "beta", "gamma")] == ["a", "b", "old"]
    for wrong in ("", "delta", "alpha ", keys.digest_of("alpha")):
        assert ring.find(wrong) is None
    assert ring.find("gamma", now + timedelta(seconds=2)) is None


@given(secret=st.text(max_size=40), others=st.lists(st.text(max_size=40), max_size=4))
def test_only_the_key_itself_opens(secret: str, others: list[str]) -> None:
    """Whatever texts are keys and whatever is presented: it opens where it is one of them."""
    ring = KeyRing(keys.of_digests(sorted({keys.digest_of(other) for other in others})))
    assert (ring.find(secret) is not None) == (secret in others)


def test_a_key_file_may_be_json_or_yaml() -> None:
    """Both give the same keys; a time without quotes is read in UTC; new keys are never alike."""
    entry = {"id": "alice", "sha256": "ab" * 32, "expires": "2030-01-01T00:00:00Z", "requests_per_s": 5}
    from_json = keys.parse(json.dumps({"keys": [entry]}).encode(), "keys.json")
    lines = ["keys:", "  - id: alice", f"    sha256: {'ab' * 32}", "    expires: 2030-01-01T00:00:00Z"]
    from_yaml = keys.parse("\n".join([*lines, "    requests_per_s: 5"]).encode(), "keys.yaml")
    assert from_json == from_yaml
    assert from_json[0].expires == datetime(2030, 1, 1, tzinfo=UTC)
    assert keys.parse(keys.to_json(from_json), "again") == from_json
    assert len({keys.new_key() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "neither JSON nor YAML"),
        ("- a", "list under the name `keys`"),
        ('{"keys": [{"id": "a", "sha256": "hunter2"}]}', "never the key"),
        (listed({"id": "a b"}), "id"),
        (listed({"rate": 5}), "rate"),
        (listed({"requests_per_s": -1}), "requests_per_s"),
        (listed({}, {"id": "b", "sha256": "AB" * 32}), "two keys"),
    ],
)
def test_a_malformed_key_file_is_a_sentence_without_its_values(content: str, said: str) -> None:
    """It names the place and the rule, and never what stands there: that might be a key."""
    with pytest.raises(ConfigError, match=said) as error:
        keys.parse(content.encode(), "keys.json")
    assert "hunter2" not in str(error.value)


def test_keys_change_while_the_endpoint_runs(any_root: str, caplog: pytest.LogCaptureFixture) -> None:
    """On each file system: a new key opens and a revoked one closes at the next look; a broken file changes nothing."""
    url = f"{any_root}/keys.json"
    write(url, key("alice", "alpha"))
    watch = KeyWatch([keys.digest_of("fixed")], url)
    assert not watch.look()
    write(url, key("bob", "beta"))
    assert watch.look()
    assert watch.ring.find("alpha") is None
    assert watch.ring.find("beta").id == "bob"
    assert watch.ring.find("fixed") is not None
    with caplog.at_level(logging.ERROR, "sceneray.serve"):
        storage.write_bytes(url, b"{")
        assert not watch.look()
        assert not watch.look()
        assert len(caplog.records) == 1, "a broken file is told once"
        storage.remove(url)
        assert not watch.look()
    assert watch.ring.find("beta") is not None
    write(url)
    assert watch.look()
    assert watch.ring.find("beta") is None
    assert not watch.ring.open, "an empty file lets nobody in"


def test_an_endpoint_does_not_start_without_its_key_file(tmp_path: Path) -> None:
    """A missing or malformed file stops the start: an endpoint must never be open by mistake."""
    with pytest.raises(ConfigError, match="sceneray keys new"):
        create_app(Still(), ApiSettings(keys_file=str(tmp_path / "keys.json")))
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(ConfigError, match="neither JSON nor YAML"):
        create_app(Still(), ApiSettings(keys_file=str(tmp_path / "keys.json")))


def test_the_running_app_takes_over_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a real server the file is looked at by itself: a key made later is answered, without a restart."""
    monkeypatch.setattr("serve.key_watch.KeyWatch.__init__.__defaults__", ((), None, 0.05))
    url = str(tmp_path / "keys.json")
    write(url, key("alice", "alpha"))
    with uvicorn_of(create_app(Still(), ApiSettings(keys_file=url))) as port:

        def status(secret: str) -> int:
            headers = {"X-API-Key": secret, "Content-Type": "image/png"}
            return httpx.post(f"http://127.0.0.1:{port}/v1/segment", content=PNG, headers=headers).status_code

        assert (status("alpha"), status("beta")) == (200, 401)
        write(url, key("bob", "beta"))
        wait_for(lambda: status("beta") == 200)
        assert status("alpha") == 401


def test_a_rate_is_held_and_told(tmp_path: Path) -> None:
    """Above its rate a key is answered 429 with Retry-After and the rate, another key is not concerned."""
    url = str(tmp_path / "keys.json")
    write(url, key("slow", "alpha", requests_per_s=0.01, burst_s=200), key("free", "beta"))
    with Client(create_app(Still(), ApiSettings(keys_file=url))) as client:

        def ask(secret: str) -> object:
            return client.post("/v1/segment", content=PNG, headers={"X-API-Key": secret, "Content-Type": "image/png"})

        assert [ask("alpha").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask("alpha")
        body = ErrorBody.model_validate_json(refused.content)
        assert body.error_type == "rate_limited"
        assert body.detail["per_second"] == {"requests": 0.01}
        assert int(refused.headers["retry-after"]) == pytest.approx(100, abs=2)
        assert [ask("beta").status_code for _ in range(4)] == [200] * 4


def test_pixels_are_counted_before_anything_is_decoded(tmp_path: Path) -> None:
    """A key with 1500 pixels gets one image of 1000; the next waits, and one of 2000 can never be."""
    url = str(tmp_path / "keys.json")
    write(url, key("a", "alpha", pixels_per_s=1, burst_s=1500))
    backend = Still()
    large = encoded(Image.new("RGB", (40, 50)), "PNG")
    with Client(create_app(backend, ApiSettings(keys_file=url))) as client:

        def ask(body: bytes) -> object:
            return client.post("/v1/segment", content=body, headers={"X-API-Key": "alpha", "Content-Type": "image/png"})

        assert ask(PNG).status_code == 200
        refused = ask(PNG)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "rate_limited")
        never = ask(large)
        assert (never.status_code, never.json()["error_type"]) == (413, "above_quota")
        assert never.json()["detail"] == {"pixels": 2000, "at_once": {"pixels_per_s": 1500}}
    assert len(backend.asked) == 1


def exchange(port: int, head: str, body: bytes) -> tuple[bytes, int]:
    """What a server answers to a request whose body is sent until it takes no more, and how much of that it took."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        sock.sendall(head.encode())
        answer = sock.recv(65536)
        view = memoryview(body)
        try:
            while sent < len(body):
                sent += sock.send(view[sent : sent + 65536])
        except OSError:
            pass  # it hung up: what was to be shown
    return answer, sent


def test_a_wrong_key_is_refused_without_reading_the_body() -> None:
    """A stranger with 100 MB is answered after the headers alone, and the server takes next to nothing of the rest."""
    body = bytes(100 * 10**6)
    head = f"POST {{}} HTTP/1.1\r\nHost: x\r\nX-API-Key: wrong\r\nContent-Length: {len(body)}\r\n"
    app = create_app(Still(), ApiSettings(key_digests=(hashlib.sha256(b"right").hexdigest(),)))
    with uvicorn_of(app) as port:
        for path in ("/v1/segment", "/predict", "/v2/models/still/infer"):
            answer, sent = exchange(port, head.format(path) + "Content-Type: image/png\r\n\r\n", body)
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert sent < 8 * 2**20  # the kernel's buffers on both sides
        polite = head.format("/v1/segment") + "Content-Type: image/png\r\nExpect: 100-continue\r\n\r\n"
        answer, _ = exchange(port, polite, b"")
        assert answer.startswith(b"HTTP/1.1 401 ")


def test_a_body_above_the_limit_is_not_read_to_its_end() -> None:
    """A declared 100 MB is refused with 413 at once; the key was right, so the order is key first, then size."""
    body = bytes(100 * 10**6)
    head = "POST /v1/segment HTTP/1.1\r\nHost: x\r\nX-API-Key: right\r\nContent-Type: image/png\r\n"
    app = create_app(Still(), ApiSettings(key_digests=(hashlib.sha256(b"right").hexdigest(),)))
    with uvicorn_of(app) as port:
        answer, sent = exchange(port, head + f"Content-Length: {len(body)}\r\n\r\n", body)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 8 * 2**20


def test_every_route_asks_for_a_key_or_is_known_to_be_open() -> None:
    """A route that somebody adds without the guard fails here."""
    app = create_app(Still(), ApiSettings(key_digests=("ab" * 32,)))
    schema = app.openapi()
    guarded = {path for path, methods in schema["paths"].items() for m in methods.values() if m.get("security")}
    assert {"/v1/segment", "/predict", "/v1/model"} <= guarded
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path not in guarded:
            assert route.path in OPEN or any(route.path.startswith(o) for o in OPEN if len(o) > 1 and o[-1] == "/")
            assert not route.path.endswith("/infer")
