"""What a run leaves behind to be read: metrics as JSON lines, TensorBoard events, worker logs, attempts.

Object stores cannot append, so lines are kept in memory and go up as numbered parts, per attempt:

    RUN/attempts/0002.json                          who ran it, from which step
    RUN/metrics/attempt-0002/part-00000.jsonl       one JSON object a line
    RUN/logs/attempt-0002/rank-000/part-00000.log   what the worker logged
    RUN/tensorboard/attempt-0002/events...          the same metrics for TensorBoard
    RUN/samples/attempt-0002/part-00000.jsonl       with log.samples: which samples each rank used in each step

A later attempt starts from a checkpoint; what earlier attempts wrote past that step is superseded and not read back.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sceneray import storage
from sceneray.errors import ConflictError, StorageError

LOGGER = "sceneray"


class Parts:
    """Lines that go up as numbered files below one folder; without a folder yet, they wait."""

    def __init__(self, folder: str | None, suffix: str) -> None:
        self.folder = folder
        self.suffix = suffix
        self.lines: list[str] = []
        self.written = 0
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        """Keep one line for the next flush."""
        with self._lock:
            self.lines.append(line)

    def flush(self) -> None:
        """Write the lines kept so far as the next part; others may add lines meanwhile. A failed flush keeps them."""
        with self._lock:
            lines = list(self.lines)
        if not lines or self.folder is None:
            return
        text = "\n".join(lines) + "\n"
        storage.write_bytes(storage.join(self.folder, f"part-{self.written:05d}.{self.suffix}"), text.encode())
        self.written += 1
        with self._lock:
            del self.lines[: len(lines)]


class TensorBoardFile:
    """Scalars written to a local event file that goes up whole at every flush."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.local = tempfile.TemporaryDirectory(prefix="sceneray-tb-")
        self.writer = SummaryWriter(self.local.name)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Write every number of a metrics row under `kind/name`."""
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self.writer.add_scalar(f"{kind}/{name}", value, row["step"])

    def flush(self) -> None:
        """Send the event files up."""
        self.writer.flush()
        for path in Path(self.local.name).iterdir():
            storage.write_bytes(storage.join(self.folder, path.name), path.read_bytes())

    def close(self) -> None:
        """End the writer and remove its local folder."""
        self.writer.close()
        self.local.cleanup()


class Sink(Protocol):
    """Where metrics rows go besides the run folder."""

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Take one row; `kind` is `train` or `val`, and `row` has a `step`."""

    def flush(self) -> None:
        """Send on what was taken so far."""

    def close(self) -> None:
        """End; called after a last flush."""


class MetricsLog:
    """The metrics of one attempt, written by rank 0: as lines in the run folder, and to every sink."""

    def __init__(self, run: str, attempt: int, tensorboard: bool, sinks: Sequence[Sink] = ()) -> None:
        self.rows = Parts(attempt_folder(run, "metrics", attempt), "jsonl")
        events = [TensorBoardFile(attempt_folder(run, "tensorboard", attempt))] if tensorboard else []
        self.sinks: tuple[Sink, ...] = (*events, *sinks)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Log one row; `kind` is `train` or `val`, and `row` has a `step`."""
        self.rows.add(json.dumps({"kind": kind, **row}))
        for sink in self.sinks:
            sink.add(kind, row)

    def flush(self) -> None:
        """Make everything logged so far durable."""
        self.rows.flush()
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Flush and end; sinks end even where the store refuses the last rows."""
        try:
            self.flush()
        finally:
            for sink in self.sinks:
                sink.close()


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Every surviving metrics row of a run, in order of its steps."""
    rows: list[dict[str, Any]] = []
    for attempt in attempts(run):
        rows = [row for row in rows if row["step"] <= attempt["from_step"]]
        folder = attempt_folder(run, "metrics", attempt["attempt"])
        for name in storage.list_names(folder):
            rows += [json.loads(line) for line in storage.read_bytes(storage.join(folder, name)).splitlines()]
    return rows


def read_samples(run: str) -> tuple[dict[int, list[list[int]]], int]:
    """What `log.samples` recorded: {step: each rank's positions} of the surviving history, and how many samples more
    were used by steps that a restart did again."""
    surviving: dict[int, list[list[int]]] = {}
    again = 0
    for attempt in attempts(run):
        for step in [step for step in surviving if step > attempt["from_step"]]:
            again += sum(map(len, surviving.pop(step)))
        folder = attempt_folder(run, "samples", attempt["attempt"])
        for name in storage.list_names(folder):
            for line in storage.read_bytes(storage.join(folder, name)).splitlines():
                row = json.loads(line)
                surviving[row["step"]] = row["positions"]
    return surviving, again


def attempts(run: str) -> list[dict[str, Any]]:
    """The records of all attempts of a run, first to last."""
    folder = storage.join(run, "attempts")
    return [storage.read_json(storage.join(folder, name)) for name in storage.list_names(folder)]


def next_attempt(run: str) -> int:
    """The number that the next attempt will try to take."""
    taken = storage.list_names(storage.join(run, "attempts"))
    return int(taken[-1].removesuffix(".json")) + 1 if taken else 1


def claim_attempt(run: str, about: Mapping[str, Any]) -> int:
    """Take the next attempt number for this worker group; two groups never get the same one."""
    while True:
        number = next_attempt(run)
        record = json.dumps({"attempt": number, **about}, indent=1).encode()
        try:
            storage.create(storage.join(run, "attempts", f"{number:04d}.json"), record)
            return number
        except ConflictError:
            continue


@contextmanager
def worker_log() -> Iterator[Parts]:
    """Collect this process's `sceneray` log records until the context ends.

    They are kept until somebody who knows the attempt gives the parts their folder (`worker_folder`).
    """
    parts = Parts(None, "log")
    handler = _PartsHandler(parts)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(LOGGER)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the run folder has it; a terminal shows progress, not every worker's log
    try:
        yield parts
    except BaseException:
        logger.exception("this worker ends with an error")
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        try:
            parts.flush()
        except StorageError as error:
            # Where the store is what failed, this must not hide the error that says so.
            sys.stderr.write("\n".join([f"the run folder did not take this log: {error}", *parts.lines, ""]))


def attempt_folder(run: str, kind: str, attempt: int) -> str:
    """Where one attempt leaves what it writes of one kind: "metrics", "logs", "samples", "profile" ..."""
    return storage.join(run, kind, f"attempt-{attempt:04d}")


def worker_folder(run: str, attempt: int, rank: int) -> str:
    """Where the log of one rank of one attempt goes."""
    return storage.join(attempt_folder(run, "logs", attempt), f"rank-{rank:03d}")


class _PartsHandler(logging.Handler):
    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def emit(self, record: logging.LogRecord) -> None:
        self.parts.add(self.format(record))
