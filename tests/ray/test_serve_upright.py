"""Quotas, deadlines, hang-ups and the access log on a real Ray Serve, with two HTTP replicas."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from jobs.serve import serving
from serve import keys
from serve.keys import Key
from tests.bundles import half_bright, write_bundle
from tests.support import POLL_S
from tests.unit.serve.uploads import encoded

LEDGER = "sceneray-quotas:sceneray"
BURST = 10
WAIT_MS = 2000  # a lone image waits so long for others: time to hang up in


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys without quotas, with ten requests and hardly any more, and with plenty."""
    limits: dict[str, dict[str, float]] = {
        "free": {},
        "slow": {"requests_per_s": 0.01, "burst_s": BURST * 100},
        "steady": {"requests_per_s": 1000},
    }
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_bytes(keys.to_json([entry(name, **limit) for name, limit in limits.items()]))
    return path


def entry(name: str, **limits: float) -> Key:
    """The entry of the key that is spelled as its id."""
    return Key.model_validate({"id": name, "sha256": keys.digest_of(name), **limits})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, key_file: Path) -> Iterator[str]:
    """An endpoint with two HTTP replicas."""
    bundle = write_bundle(str(tmp_path_factory.mktemp("serve") / "bundle"))
    options: dict[str, Any] = {"mode": "fast", "max_batch_size": 4, "batch_wait_ms": WAIT_MS, "ingress_replicas": 2}
    with serving(bundle, api_keys_file=str(key_file), deadline_s=20, **options) as url:
        yield url


def model(url: str, key: str) -> httpx.Response:
    """A cheap question that a key is asked for."""
    return httpx.get(f"{url}/v1/model", headers={"X-API-Key": key}, timeout=60)


def segment(url: str, name: str, timeout: float = 60, **headers: str) -> httpx.Response:
    """An upload that lies in the queue for a while, named `name`."""
    sent = {"X-API-Key": "free", "x-request-id": name} | {k.replace("_", "-"): v for k, v in headers.items()}
    photo = encoded(Image.fromarray(half_bright()[0]), "PNG")
    return httpx.post(f"{url}/v1/segment", content=photo, headers=sent, timeout=timeout)


def waited_for(look: Any, seconds: float = 30.0) -> Any:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(POLL_S)
    return found


def ledger() -> Any:
    """The quotas' actor; None where there is none."""
    import ray  # only now: it reads the mode of its tokens when it is imported

    try:
        return ray.get_actor(LEDGER, namespace="serve")
    except ValueError:
        return None


def log_folder() -> Path:
    """Where this Ray keeps its logs."""
    import ray

    return Path(ray._private.worker._global_node.get_logs_dir_path())


def logged(name: str) -> list[dict[str, Any]]:
    """The lines of the access log about a request, from the files that Ray keeps of each replica's stdout."""
    folder = log_folder()
    lines = [line for file in folder.glob("worker-*.out") for line in file.read_text(errors="replace").splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{") and '"request_id"' in line]
    return [line for line in found if line["request_id"] == name]


def test_a_quota_holds_over_all_http_replicas(url: str) -> None:
    """Thirty requests at once, over two replicas: exactly the ten of the key's burst are answered."""
    assert model(url, "steady").status_code == 200
    waited_for(ledger)
    waited_for(lambda: all(model(url, "steady").status_code == 200 for _ in range(10)))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: model(url, "slow"), range(30)))
    assert sorted(answer.status_code for answer in answers) == [200] * BURST + [429] * (30 - BURST)
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error_type"] == "rate_limited"
    assert int(refused.headers["retry-after"]) >= 1
    assert model(url, "free").status_code == 200
    assert model(url, "nobody").status_code == 401


def test_a_lost_ledger_is_made_again_and_fails_nobody(url: str) -> None:
    """With the actor killed for good, requests within their quota are answered all the while, and a new one appears."""
    import ray

    model(url, "steady")
    first = waited_for(ledger)
    ray.kill(first, no_restart=True)
    statuses = []

    def another() -> bool:
        statuses.append(model(url, "steady").status_code)
        found = ledger()
        return found is not None and found._actor_id != first._actor_id

    waited_for(another)
    assert set(statuses) == {200}


def test_a_late_answer_is_ours_before_it_is_rays(url: str) -> None:
    """Through Serve's proxy too: a 504 in JSON under the caller's id, and one line in a replica's log."""
    answer = segment(url, "too-late", x_request_timeout_s="0.3")
    assert (answer.status_code, answer.json()["error_type"]) == (504, "deadline_exceeded")
    assert answer.headers.get_list("x-request-id") == ["too-late"] == [answer.json()["request_id"]]
    (line,) = waited_for(lambda: logged("too-late"))
    assert (line["status"], line["key"], line["path"]) == (504, "free", "/v1/segment")


def test_who_hangs_up_is_called_off(url: str) -> None:
    """The request ends in the replica when its caller is gone, long before its answer would have been ready."""
    with pytest.raises(httpx.ReadTimeout):
        segment(url, "gone", timeout=0.5)
    (line,) = waited_for(lambda: logged("gone"))
    assert (line["status"], line["error_type"]) == (499, "client_gone")
    assert line["ms"]["total"] < WAIT_MS


def test_a_new_key_opens_without_a_restart(url: str, key_file: Path) -> None:
    """Every HTTP replica takes over a changed key file within seconds."""
    assert model(url, "later").status_code == 401
    known = keys.read(str(key_file))
    key_file.write_bytes(keys.to_json([*known, entry("later")]))
    waited_for(lambda: all(model(url, "later").status_code == 200 for _ in range(10)))


def test_the_log_holds_no_key(url: str) -> None:
    """Nowhere in what the replicas wrote stands the header of a key or its value in it."""
    segment(url, "secretive", X_API_Key="a-wrong-secret")
    (line,) = waited_for(lambda: logged("secretive"))
    assert line["status"] == 401
    assert not [file for file in log_folder().rglob("*") if file.is_file() and b"a-wrong-secret" in file.read_bytes()]
