"""The endpoint while its replicas are killed and its model is changed: what callers see under a steady load."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.serve import serving
from sceneray import bundle, repository, storage
from sceneray.data.images import decode_label
from tests.bundles import agree, half_bright, write_bundle
from tests.support import POLL_S
from tests.unit.serve.uploads import encoded

IMAGE, MASK = half_bright()
BODY = encoded(Image.fromarray(IMAGE), "PNG")
PATIENCE_S = 90.0
CALLERS = 4


class Load:
    """Callers who ask one after the other until the context ends; what they were answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.wrong = 0
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for(CALLERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def wait_for(self, more: int) -> None:
        """Until `more` good answers than now are there."""
        wanted, deadline = self.statuses["200"] + more, time.monotonic() + PATIENCE_S
        while self.statuses["200"] < wanted:
            assert time.monotonic() < deadline, dict(self.statuses)
            time.sleep(POLL_S)

    def wait_for_version(self, version: str) -> None:
        """Until `version` answers."""
        seen, deadline = self.versions[version], time.monotonic() + PATIENCE_S
        while self.versions[version] < seen + CALLERS:
            assert time.monotonic() < deadline, dict(self.versions)
            time.sleep(POLL_S)

    @property
    def failed(self) -> dict[str, int]:
        """How often each answer came that was none."""
        return {status: count for status, count in self.statuses.items() if status != "200"}

    def _call(self) -> None:
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client:
            while not self._ended.is_set():
                started_at = time.monotonic()
                version, right = "", True
                try:
                    answer = client.post("/v1/segment", content=BODY, headers={"Content-Type": "image/png"})
                    status = str(answer.status_code)
                    if status == "200":
                        version = answer.headers["x-model-version"]
                        right = agree(np.asarray(decode_label(answer.content)), MASK)
                except httpx.TransportError as error:
                    status = type(error).__name__
                with self._lock:
                    self.statuses[status] += 1
                    self.versions[version] += bool(version)
                    self.wrong += not right
                    self.longest_s = max(self.longest_s, time.monotonic() - started_at)


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if f"ServeReplica:sceneray:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for_replicas(deployment: str, count: int, but: int | None = None) -> None:
    """Until `count` replicas run, the killed one not among them."""
    deadline = time.monotonic() + PATIENCE_S
    while len([process for process in replicas(deployment) if process.pid != but]) < count:
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


@contextlib.contextmanager
def endpoint(url: str, count: int, together: bool = False) -> Iterator[str]:
    """An endpoint with `count` model replicas, and two ingress replicas or none."""
    http = {"together": True} if together else {"ingress_replicas": 2}
    with serving(url, replicas=count, cpus=0.25, threads=1, follow_s=1, access_log=False, **http) as base:
        yield base


@pytest.mark.chaos
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slice), 3])
def test_a_killed_replica_costs_at_most_what_it_was_working_on(tmp_path: Path, count: int) -> None:
    """kill -9 of a model replica and of an ingress replica: no caller hangs, no mask is wrong, and at most the requests
    in flight on the killed one are lost; those of a model replica are asked again elsewhere."""
    with endpoint(write_bundle(str(tmp_path / "bundle")), count) as url, Load(url) as load:
        victim = replicas("Segmenter")[0]
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_replicas("Segmenter", count, but=victim.pid)
        load.wait_for(40)
        model_lost, answered = dict(load.failed), load.statuses["200"]
        victim = replicas("Ingress")[0]
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_replicas("Ingress", 2, but=victim.pid)
        load.wait_for(40)
    both = load.failed
    print(f"\n{count} replicas: model replica killed, lost {model_lost} of {answered}; ingress replica killed, lost "
          f"{sum(both.values()) - sum(model_lost.values())} of {load.statuses['200'] - answered}; {both}; longest "
          f"{load.longest_s:.1f} s")  # fmt: skip
    assert load.wrong == 0
    assert model_lost == {}
    assert sum(both.values()) <= CALLERS


@pytest.mark.chaos
@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slice)])
def test_a_killed_process_of_both_costs_at_most_what_it_was_working_on(tmp_path: Path, count: int) -> None:
    """With HTTP and model in one process kill -9 loses at most what was in flight there, and it is answered."""
    with endpoint(write_bundle(str(tmp_path / "bundle")), count, together=True) as url, Load(url) as load:
        victim = replicas("Segmenter")[0]
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_replicas("Segmenter", count, but=victim.pid)
        load.wait_for(40)
    print(f"\n{count} together: lost {load.failed} beside {load.statuses['200']}; longest {load.longest_s:.1f} s")
    assert load.wrong == 0
    assert sum(load.failed.values()) <= CALLERS


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("count", "together"), [pytest.param(1, False, marks=pytest.mark.slice), (3, False), (1, True)]
)
def test_a_model_is_changed_back_and_refused_under_load(tmp_path: Path, count: int, together: bool) -> None:
    """Promote, rollback and a promote of a damaged bundle: every request is answered rightly, by a version that was
    champion; the damaged one answers nothing, and /v1/model says that it was refused."""
    repo = str(tmp_path / "repo")
    made = {version: write_bundle(str(tmp_path / version), version) for version in ("1", "2", "3")}

    def promote(version: str) -> str:
        added = repository.add(repo, "brightness", version, bundle.find(made[version]))
        repository.set_champion(repository.read(repo, "brightness"), added)
        return added.url

    promote("1")
    with endpoint(f"{repo}/brightness@champion", count, together) as url, Load(url) as load:
        promote("2")
        load.wait_for_version("2")
        repository.rollback(repo, "brightness")
        load.wait_for_version("1")
        storage.write_bytes(storage.join(promote("3"), bundle.WEIGHTS), b"damaged after it was promoted")
        deadline = time.monotonic() + PATIENCE_S
        candidate = None
        while candidate is None or candidate["state"] == "loading":
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
            candidate = httpx.get(f"{url}/v1/model").json()["candidate"]
        load.wait_for(20)
    print(f"\n{count} replicas, together {together}: {load.statuses['200']} answers, {dict(load.versions)}, failed "
          f"{load.failed}, longest {load.longest_s:.1f} s")  # fmt: skip
    assert candidate["state"] == "refused"
    assert load.failed == {}
    assert load.wrong == 0
    assert set(load.versions) - {""} == {"1", "2"}
