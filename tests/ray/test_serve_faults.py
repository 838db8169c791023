"""The endpoint while its replicas are killed and its model is changed: what callers see under a steady load."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs.serve import serving
from sceneray import bundle, repository, storage
from tests.bundles import write_bundle
from tests.callers import CALLERS, PATIENCE_S, Load, replicas, wait_for_replicas
from tests.support import POLL_S


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
