"""The watchdog: quiet while there is progress, and heard once where there is none."""

from __future__ import annotations

import threading

from sceneray.liveness import FIRST_BEAT, Watchdog

PATIENCE_S = 30


def test_a_standstill_is_told_with_the_stacks() -> None:
    """After a first beat and then none, the watchdog says for how long, and where every thread stands."""
    heard: list[str] = []
    told = threading.Event()

    def on_hang(text: str) -> None:
        heard.append(text)
        told.set()

    with Watchdog(0.2, on_hang) as watchdog:
        watchdog.beat()
        assert told.wait(PATIENCE_S)
    assert len(heard) == 1
    assert heard[0].startswith("no progress for 0 s; the threads stand at:\nthread ")
    assert "test_a_standstill_is_told_with_the_stacks" in heard[0]


def test_progress_and_the_first_step_are_left_alone() -> None:
    """While beats come nothing is said, and before the first one much more time is given."""
    heard: list[str] = []
    with Watchdog(0.5, heard.append) as watchdog:
        for _ in range(20):
            watchdog.beat()
            threading.Event().wait(0.05)  # work that takes a while
    with Watchdog(1.0, heard.append):
        threading.Event().wait(1.5)  # a first step that is slow
    assert FIRST_BEAT > 1.5
    assert heard == []


def test_without_anybody_to_tell_nothing_is_watched() -> None:
    """Outside a cluster's worker no thread is started."""
    before = threading.active_count()
    with Watchdog(0.1, None) as watchdog:
        watchdog.beat()
        assert threading.active_count() == before
