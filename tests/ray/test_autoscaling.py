"""Model replicas come and go with the load on a real Ray Serve, down to none, and no request is lost to it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from jobs.serve import APP, serving
from tests.bundles import half_bright, write_bundle
from tests.support import POLL_S, ROOT
from tests.unit.serve.uploads import encoded

PNG = encoded(Image.fromarray(half_bright()[0]), "PNG")
PIXELS = 48 * 64
# Replicas that ask for little, so that three fit beside the ingress; and every delay short.
QUICK = {"cpus": 0.2, "threads": 1, "look_back_s": 2, "upscale_delay_s": 0, "downscale_delay_s": 4, "access_log": False}
CALLERS = 6
LONGEST_S = 90  # for one change: a replica imports torch, and several start at once


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("autoscaling") / "bundle"))


def running() -> int:
    """Model replicas that answer now."""
    from ray import serve

    states = serve.status().applications[APP].deployments["Segmenter"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def replicas() -> int:
    """Model replicas in any state: starting, answering, ending."""
    from ray import serve

    return sum(serve.status().applications[APP].deployments["Segmenter"].replica_states.values())


class Watch:
    """Waits for numbers of replicas, and tells when they came."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._from = time.monotonic()

    def until(self, wanted: int, most: int) -> None:
        """Wait until so many run and no other starts or ends; fail above `most`, or after LONGEST_S."""
        deadline = time.monotonic() + LONGEST_S
        while (found := (running(), replicas())) != (wanted, wanted):
            assert found[0] <= most, f"{found} replicas, of at most {most}"
            assert time.monotonic() < deadline, f"{found} replicas, not {wanted}, after {LONGEST_S} s"
            time.sleep(POLL_S)
        print(f"{self._what}: {wanted} replicas after {time.monotonic() - self._from:.1f} s")


@contextmanager
def callers(url: str, count: int) -> Iterator[list[int]]:
    """`count` callers who each send their next photograph when the last is answered; yields all statuses so far."""
    statuses: list[int] = []
    enough = threading.Event()

    def call() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not enough.is_set():
                answer = client.post("/v1/segment", content=PNG, headers={"Content-Type": "image/png"})
                statuses.append(answer.status_code)

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(call) for _ in range(count)]
        try:
            yield statuses
        finally:
            enough.set()
    for done in calls:
        done.result()


@pytest.mark.chaos
@pytest.mark.slice
def test_replicas_follow_the_load_up_and_down(bundle: str) -> None:
    """One replica becomes three under six callers and one again after them; every request is answered with 200."""
    # Batches that wait half a second keep pixels in the queue without keeping this machine busy.
    options: dict[str, Any] = {"mode": "fast", "max_batch_size": 64, "batch_wait_ms": 500, "target_pixels": PIXELS}
    with serving(bundle, max_replicas=3, **options, **QUICK) as url:
        assert running() == 1
        up = Watch("six callers")
        with callers(url, CALLERS) as statuses:
            up.until(3, most=3)
            before = len(statuses)
            Watch("six callers still").until(3, most=3)
            deadline = time.monotonic() + LONGEST_S
            while len(statuses) < before + 5 * CALLERS and time.monotonic() < deadline:
                time.sleep(POLL_S)
            assert running() == 3
        Watch("nobody").until(1, most=3)
        assert len(statuses) >= before + 5 * CALLERS
        assert set(statuses) == {200}
        print(f"{len(statuses)} requests, all answered")


@pytest.mark.chaos
def test_the_last_replica_ends_and_the_next_request_starts_one(bundle: str) -> None:
    """With replicas=0 the idle model ends, liveness does not wake it, and a request does and is answered."""
    with serving(bundle, replicas=0, max_replicas=1, idle_s=3, **QUICK) as url:
        assert running() == 1  # a bundle that cannot be loaded would have been noticed
        Watch("nobody").until(0, most=1)
        assert httpx.get(f"{url}/livez", timeout=30).status_code == 200
        assert replicas() == 0
        first = Watch("the first request")
        answer = httpx.post(f"{url}/v1/segment", content=PNG, headers={"Content-Type": "image/png"}, timeout=LONGEST_S)
        assert answer.status_code == 200
        first.until(1, most=1)
        Watch("nobody again").until(0, most=1)


def test_the_policy_needs_nothing_of_ours_where_it_runs(tmp_path: Path) -> None:
    """Serve pickles the policy by value: a controller that cannot import `serve.scaling` runs it all the same."""
    from ray.serve.config import AutoscalingPolicy

    from serve.scaling import QueuedPixels

    policy = AutoscalingPolicy(policy_function=QueuedPixels, policy_kwargs={"target_pixels": 1.0})
    (tmp_path / "policy").write_bytes(policy.get_serialized_policy_def() or b"")
    code = (
        "import sys; from types import SimpleNamespace as N; from ray import cloudpickle\n"
        "policy = cloudpickle.loads(open('policy', 'rb').read())(target_pixels=1.0, up_delay_s=0)\n"
        "ctx = N(aggregated_metrics={'pixels': {'a': 3.0}, 'requests': {'a': 9.0}}, total_queued_requests=None,\n"
        "        current_num_replicas=1, target_num_replicas=1, capacity_adjusted_min_replicas=1,\n"
        "        capacity_adjusted_max_replicas=2, current_time=0.0, policy_state={})\n"
        "ours = [name for name in sys.modules if name.split('.')[0] in ('serve', 'sceneray')]\n"
        "print(policy(ctx)[0], ours)\n"
    )
    env = {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2 []"), done.stderr
    assert str(ROOT) not in done.stdout
