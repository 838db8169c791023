"""The arithmetic of the benchmark of overload, and what it sees of processes."""

from __future__ import annotations

import time

import psutil
import pytest

from benchmarks import overload
from benchmarks.endpoints import flood, tree


def test_refusals_are_counted_apart_from_answers() -> None:
    """Goodput counts what was answered in time, the refusals have latencies of their own, and seconds stay in order."""
    tally = flood.Tally(answered=[(0.5, 0.1), (1.5, 0.2), (2.5, 9.0)], refused=[(1.2, 0.01), (1.9, 0.03)])
    found = flood.summary(tally, seconds=2.0, took=3.0)
    assert found["goodput"] == 1.0
    assert (found["p50"], found["refused_p99"]) == (0.2, 0.03)
    assert (found["per_second"], found["refused_per_second"]) == ([1, 1, 1], [0, 2, 0])
    assert flood.total_s("decode;dur=4.0, total;dur=12.5") == 0.0125
    assert flood.total_s("") is None


def test_the_overload_is_bounded_by_what_can_be_refused() -> None:
    """Ten times the peak, or half the refusal-only rate where that is less, and never below twice the peak."""
    assert overload.refusal_rate({"refused_per_second": [900, 0, 300, 320, 340]}) == 320
    assert overload.refusal_rate({"refused_per_second": [5, 0, 0]}) == 0
    assert overload.offered(10.0, 500.0) == 100.0
    assert overload.offered(10.0, 120.0) == 60.0
    assert overload.offered(10.0, 0.0) == 20.0


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("ray::ProxyActor", "proxy"),
        ("ray::ServeReplica:sceneray:Ingress", "ingress"),
        ("ray::ServeReplica:sceneray:Segmenter.handle_request", "model"),
        ("/x/ray/core/src/ray/raylet/raylet --a", "raylet"),
        ("ray::IDLE", "others"),
    ],
)
def test_an_endpoints_processes_are_told_apart(command: str, part: str) -> None:
    """Memory is counted for the proxy, the HTTP replica and the model replica each."""
    assert tree.part_of(command) == part


def test_a_watched_process_has_memory_and_cores() -> None:
    """This process, watched, shows its memory under every heading, and the cores that it burnt."""
    with tree.Watch(psutil.Process()) as watch:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    memory, cores = watch.memory_mib(0.0)["all"], watch.cores()
    assert memory["most"] >= memory["end"] > 1
    assert cores["all"] > 0
