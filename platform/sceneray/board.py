"""Where a run's workers and its driver leave word for each other.

A module of its own and free of torch: the process that holds the board starts fast and stays small.
"""

from __future__ import annotations

from typing import Any


class Board:
    """Progress one way, a wish to stop the other. Lives in a Ray actor (`sceneray.ray_train`)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.stop = False
        self.failure: tuple[str, str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        """A worker's progress."""
        self.rows.append(row)

    def take(self) -> tuple[list[dict[str, Any]], tuple[str, str] | None]:
        """Progress since the last call, and the failure that ended a worker for good."""
        rows, self.rows = self.rows, []
        return rows, self.failure

    def request_stop(self) -> None:
        """Ask the workers to save and leave."""
        self.stop = True

    def stop_requested(self) -> bool:
        """True once somebody asked."""
        return self.stop

    def fail(self, kind: str, message: str) -> None:
        """A worker met an error that starting again would only repeat."""
        self.failure = self.failure or (kind, message)

    def failed(self) -> bool:
        """True once a worker failed for good."""
        return self.failure is not None
