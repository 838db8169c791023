"""Noticing that a worker stands still: by its progress, not by whether its process lives."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

FIRST_BEAT = 10  # times the timeout: what the first beat may take


class Watchdog:
    """Calls `on_hang(text)` once if no `beat` came for `timeout_s`; the text has the stack of every thread.

    A collective that never ends, a loader whose process is stuck, a read that never returns: all of them hold the main
    thread, and none of them ends the process. Until the first `beat` ten times as long is allowed: shards are copied
    and networks compiled then. Without `on_hang` nothing is watched.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[str], None] | None) -> None:
        self.timeout_s = timeout_s
        self.on_hang = on_hang
        self._beat_at = time.monotonic()
        self._patience_s = FIRST_BEAT * timeout_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, *_: object) -> None:
        """There is progress."""
        self._beat_at = time.monotonic()
        self._patience_s = self.timeout_s

    def __enter__(self) -> Watchdog:
        self._beat_at = time.monotonic()
        if self.on_hang is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()

    def _watch(self) -> None:
        assert self.on_hang is not None
        pause_s = min(5.0, self.timeout_s / 10)
        looked_at = time.monotonic()
        while not self._ended.wait(pause_s):
            now = time.monotonic()
            if now - looked_at > 2 * pause_s + 1:
                self._beat_at = now  # this thread stood still too: the whole process was stopped, or the machine was
            elif now - self._beat_at > self._patience_s:
                self.on_hang(f"no progress for {now - self._beat_at:.0f} s; the threads stand at:\n{stacks()}")
                return
            looked_at = now


def stacks() -> str:
    """Where every thread of this process stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
