"""What one rank of one attempt writes down: its log, and on rank 0 metrics, status and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from sceneray import costs, runlog, status, storage
from sceneray.config import TrainSettings
from sceneray.errors import StorageError
from sceneray.mlflow_log import sinks_of
from sceneray.retries import patiently
from sceneray.saver import Saved
from sceneray.steps import Runtime

log = logging.getLogger("sceneray.books")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an attempt begins, and on which machines ("ID TYPE", one for each rank)."""

    step: int
    steps: int
    epoch: float
    nodes: list[str]


class Books:
    """Rows are added while training; `flush` makes them durable and runs in the saver's thread."""

    def __init__(
        self, settings: TrainSettings, runtime: Runtime, attempt: int, lines: runlog.Parts, start: Start
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.attempt = attempt
        self.lines = lines
        self.began_at = time.monotonic()
        self.metrics: runlog.MetricsLog | None = None
        self.samples: runlog.Parts | None = None
        self.earlier: list[status.Status] = []
        self.status: status.Status | None = None
        self.files: list[tuple[str, bytes]] = []
        self._told_step = -1
        run = settings.run
        if runtime.rank == 0:
            if settings.log.samples:
                self.samples = runlog.Parts(runlog.attempt_folder(run, "samples", attempt), "jsonl")
            self.metrics = runlog.MetricsLog(run, attempt, settings.log.tensorboard, sinks_of(settings, attempt))
            self.earlier = [one for one in _statuses(settings) if one.attempt < attempt]
            self.status = self._first_status(start)

    def _first_status(self, start: Start) -> status.Status:
        types = dict(Counter(node.partition(" ")[2] for node in set(start.nodes)))
        now = _now()
        return status.Status(
            attempt=self.attempt,
            state="running",
            from_step=start.step,
            step=start.step,
            steps=start.steps,
            epoch=start.epoch,
            epochs=self.settings.epochs,
            miou=None,
            workers=self.runtime.world_size,
            started_at=now,
            updated_at=now,
            seconds=0.0,
            nodes=types,
            price_per_hour=costs.price_per_hour(types, self.settings.cost.price_per_hour),
        )

    @property
    def age_s(self) -> float:
        """Seconds since this attempt began."""
        return time.monotonic() - self.began_at

    def note(self, text: str) -> None:
        """A line for the log and for who watches."""
        log.info(text)
        if self.runtime.rank == 0:
            self.runtime.progress({"kind": "note", "text": text})

    def add(self, kind: str, row: dict[str, Any], shown: dict[str, Any] | None = None) -> None:
        """A metrics row; `shown` is what the live line needs besides. Does nothing on ranks other than 0."""
        if self.metrics is not None:
            self.metrics.add(kind, row)
            self.runtime.progress({"kind": kind, **row, **(shown or {})})

    def add_samples(self, step: int, positions: list[list[int]]) -> None:
        """Record the positions that each rank used in a step, where `log.samples` asks for it."""
        if self.samples is not None:
            self.samples.add(json.dumps({"step": step, "positions": positions}))

    def add_file(self, url: str, data: bytes) -> None:
        """A whole file for the next flush to write."""
        self.files.append((url, data))

    def about_earlier(self) -> list[str]:
        """What restarting cost, as lines for the log."""
        if not self.earlier or self.status is None:
            return []
        before = self.earlier[-1]
        redo = max(0, before.step - self.status.from_step)
        began_at, last_word = (datetime.fromisoformat(t) for t in (self.status.started_at, before.updated_at))
        size = f"{before.workers} → {self.status.workers} workers" if before.workers != self.status.workers else "again"
        pause_s = (began_at - last_word).total_seconds()
        last = f"{pause_s:.0f} s since the last word of attempt {before.attempt}"
        return [f"attempt {self.attempt}: {size}; {redo} steps to redo, {last}"]

    def seen(self, row: dict[str, Any]) -> None:
        """A row of training: where the attempt is."""
        if self.status is not None:
            first = self.status.first_step_after_s
            self.update(
                step=row["step"],
                epoch=row["epoch"],
                images_per_second=row["images_per_second"],
                first_step_after_s=self.age_s if first is None else first,
            )

    def scored(self, miou: float) -> None:
        """The current weights were scored."""
        if self.status is not None and miou > (self.status.miou or 0.0):
            self.update(miou=miou)

    def update(self, **changes: Any) -> None:
        """Change fields of the status that the next flush writes."""
        if self.status is not None:
            self.status = dataclasses.replace(self.status, **changes)

    def cost(self) -> float:
        """What the run has cost until now, all attempts together."""
        if self.status is None:
            return 0.0
        return costs.cost_so_far(self.earlier, self.age_s, self.status.price_per_hour)

    def flush(self, saved: Saved | None) -> None:
        """Make everything written down durable. Raises StorageError where the store refuses."""
        self.lines.flush()
        if self.samples is not None:
            self.samples.flush()
        if self.metrics is not None:
            self.metrics.flush()
        while self.files:
            storage.write_bytes(*self.files[0])
            self.files.pop(0)
        if self.status is not None:
            # A copy: the training thread may be changing the status meanwhile.
            now = dataclasses.replace(self.status, seconds=self.age_s, updated_at=_now())
            if saved is not None:
                now = dataclasses.replace(now, saved_step=saved.step, saved_after_s=saved.seconds)
            status.write(self.settings.run, now)
        if saved is not None and saved.step != self._told_step:
            self._told_step = saved.step
            self.runtime.on_saved(saved.step)

    def close(self) -> None:
        """Give back what the metrics hold open. Where the store fails, the last rows are lost and the log says so."""
        if self.metrics is not None:
            try:
                self.metrics.close()
                if self.status is not None and self.status.state == "failed":
                    status.write(self.settings.run, self.status)  # the saver may be what failed
            except StorageError as error:
                log.warning("the last metrics and the status were not written: %s", error)
            self.metrics = None


def _statuses(settings: TrainSettings) -> list[status.Status]:
    """How the attempts so far went; none where that cannot be read, unless a budget depends on it."""
    try:
        return patiently("reading statuses", lambda: status.read_all(settings.run), settings.save.tolerate_s)
    except StorageError as error:
        if settings.cost.budget is not None:
            raise
        log.warning("what earlier attempts cost is not known: %s", error)
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
