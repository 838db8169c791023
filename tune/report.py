"""What a sweep leaves behind to be read: a record for each trial, a table, sweep.json and best.yaml.

SWEEP/config.yaml          the resolved settings of the sweep
SWEEP/trials/0003/         the run folder of a trial, as `sceneray train` writes it
SWEEP/trials/0003.json     its values, its scores and how it ended
SWEEP/sweep.json           all records and the best trial
SWEEP/best.yaml            settings for `sceneray train` with the best trial's values
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sceneray import config, runlog, storage
from sceneray.errors import StorageError
from tune.settings import TuneSettings, best_settings, run_of

VERSION = 1

WAITING = "not started"
RUNNING = "running"
FINISHED = "finished"
STOPPED = "stopped early"
OUT_OF_TIME = "out of time"
INTERRUPTED = "interrupted"
FAILED = "failed"
# A trial in one of these states is not run again when the sweep goes on.
KEPT = (FINISHED, STOPPED)


@dataclass
class Record:
    """One trial: what it tried, what it scored and how it ended."""

    id: str
    values: dict[str, Any]
    state: str = WAITING
    reason: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # one row an evaluation, in order of steps

    @property
    def epochs(self) -> float:
        """Epochs at the last evaluation."""
        return self.history[-1]["epoch"] if self.history else 0.0

    def best(self, metric: str) -> dict[str, float] | None:
        """The evaluation with the highest `metric`, the earliest of equals; None where none has it."""
        rows = [row for row in self.history if math.isfinite(row.get(metric, math.nan))]
        return max(rows, key=lambda row: row[metric]) if rows else None


def val_history(run: str) -> list[dict[str, float]]:
    """The numbers of every surviving evaluation of a run, read from its metrics; empty where there is no run."""
    rows = [row for row in runlog.read_metrics(run) if row["kind"] == "val"]
    return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]


def save_record(sweep: str, record: Record) -> None:
    """Write a trial's record."""
    storage.write_json(run_of(sweep, record.id) + ".json", {"version": VERSION, **asdict(record)})


def load_record(sweep: str, trial: str) -> Record | None:
    """The record of a trial; None where there is none. Raises StorageError for a record of another version."""
    url = run_of(sweep, trial) + ".json"
    try:
        tree = storage.read_json(url)
    except FileNotFoundError:
        return None
    if not isinstance(tree, dict) or tree.pop("version", None) != VERSION:
        raise StorageError(f"{url} is no trial record of version {VERSION}. Use a new sweep folder.")
    return Record(**tree)


def ranked(records: Iterable[Record], metric: str) -> list[Record]:
    """The records with the highest score first; those without a score last."""

    def key(record: Record) -> tuple[bool, float, str]:
        row = record.best(metric)
        return (row is None, 0.0 if row is None else -row[metric], record.id)

    return sorted(records, key=key)


def table(records: Sequence[Record], metric: str) -> str:
    """The trials as text, best first; below it, why trials failed."""
    searched = list(dict.fromkeys(key for record in records for key in record.values))
    lines = [["trial", *searched, metric, "epochs", "state"]]
    ordered = ranked(records, metric)
    for record in ordered:
        row = record.best(metric)
        score = "-" if row is None else f"{row[metric]:.4f}"
        values = [short(record.values.get(key, "-")) for key in searched]
        lines.append([record.id, *values, score, short(record.epochs), record.state])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    failures = [f"trial {record.id} failed: {record.reason}" for record in ordered if record.state == FAILED]
    return "\n".join([*text, *([""] if failures else []), *failures])


def document(records: Sequence[Record], settings: TuneSettings) -> dict[str, Any]:
    """The whole sweep as plain JSON values, best trial first: the content of sweep.json."""
    trials = [
        {
            **asdict(record),
            "run": run_of(settings.sweep, record.id),
            "best": record.best(settings.metric),
            "epochs": record.epochs,
        }
        for record in ranked(records, settings.metric)
    ]
    scored = bool(trials) and trials[0]["best"] is not None
    return {
        "version": VERSION,
        "sweep": settings.sweep,
        "metric": settings.metric,
        "space": settings.space,
        "best": trials[0]["id"] if scored else None,
        "best_yaml": storage.join(settings.sweep, "best.yaml") if scored else None,
        "trials": trials,
    }


def best_yaml(record: Record, settings: TuneSettings) -> str:
    """Settings that `sceneray train` takes, with the values of `record`, and a comment that says whence they are."""
    row = record.best(settings.metric)
    assert row is not None, "the best trial has a score"
    comment = [
        f"The best of a sweep: trial {record.id} of {settings.sweep}",
        f"with {listed(record.values)}",
        f"reached val {settings.metric} {row[settings.metric]:.4f} at epoch {short(row['epoch'])} with one worker.",
        f"Command: sceneray train {storage.join(settings.sweep, 'best.yaml')}",
        f"Expected: about that {settings.metric}, in the time of one trial that runs to its end.",
    ]
    return "".join(f"# {line}\n" for line in comment) + config.dump(best_settings(settings, record.values))


def listed(values: Mapping[str, Any]) -> str:
    """`optimizer.lr=0.0123, model.dropout=0.1`"""
    return ", ".join(f"{key}={short(value)}" for key, value in values.items())


def short(value: Any) -> str:
    """A value as a table shows it: a real number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
