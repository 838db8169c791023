"""Where a run's workers, its driver and Ray's controller leave word for each other.

A module of its own and free of torch: the process that holds the board starts fast and stays small.
"""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

GONE_AFTER_S = 4.0  # rank 0 looks at the board several times in this long


class Wishes(NamedTuple):
    """What the workers are asked for."""

    stop: bool  # save and end
    leave: bool  # save and leave: the run goes on with other workers
    save: int  # number of the newest request to save and go on; 0: none that waits for an answer


class Board:
    """Progress one way, wishes the other. Lives in a Ray actor (`sceneray.ray_train`)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.stop = False
        self.leave = False
        self.failure: tuple[str, str] | None = None
        self.save_asked = 0
        self.save_done = 0
        self.seen_at = time.monotonic()
        self.seen = False
        self.attempt = 0
        self.controller: object = None

    def add(self, row: dict[str, Any]) -> None:
        """A worker's progress."""
        if row["kind"] == "attempt":
            self.attempt = row["attempt"]
        self.rows.append(row)

    def take(self) -> tuple[list[dict[str, Any]], tuple[str, str] | None, float]:
        """Progress since the last call, the failure that ended a worker for good, and seconds without any worker."""
        rows, self.rows = self.rows, []
        return rows, self.failure, time.monotonic() - self.seen_at

    def introduce_controller(self, handle: object) -> None:
        """The actor that starts the workers leaves its handle, for a driver that has to end it."""
        self.controller = handle

    def controller_handle(self) -> object:
        """The newest controller's handle; None before there is one."""
        return self.controller

    def request_stop(self) -> None:
        """Ask the workers to save and end."""
        self.stop = True

    def request_leave(self) -> None:
        """Ask the workers to save and make room for another worker group."""
        self.leave = True

    def wishes(self) -> Wishes:
        """Asked by rank 0 all the time, which also shows that it lives."""
        self.seen_at, self.seen = time.monotonic(), True
        return Wishes(self.stop, self.leave, self.save_asked if self.save_asked > self.save_done else 0)

    def request_save(self) -> int:
        """Ask for a checkpoint now; returns the request's number."""
        self.save_asked += 1
        return self.save_asked

    def saved(self, number: int) -> None:
        """A checkpoint taken after request `number` is committed."""
        self.save_done = max(self.save_done, number)

    def answer(self, number: int) -> Literal["saved", "waiting", "gone"]:
        """What became of a request to save; "gone" where no worker is there to answer it."""
        if self.save_done >= number:
            return "saved"
        if self.seen and time.monotonic() - self.seen_at <= GONE_AFTER_S:
            return "waiting"
        self.save_asked = self.save_done  # the next workers are not asked for it
        return "gone"

    def fail(self, kind: str, message: str) -> None:
        """A worker met an error that starting again would only repeat."""
        self.failure = self.failure or (kind, message)

    def superseded(self, attempt: int, message: str) -> None:
        """A worker's attempt was overtaken: the end where it is this board's newest, so by another command; else by the
        group that came after it here, and nothing to tell."""
        if attempt >= self.attempt:
            self.fail("SupersededError", message)

    def failed(self) -> bool:
        """True once a worker failed for good."""
        return self.failure is not None
