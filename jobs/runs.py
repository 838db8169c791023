"""`sceneray runs`: what runs there are, how they are doing and what they cost, read from their folders alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs import tables
from jobs.cli import main_of

if TYPE_CHECKING:
    from sceneray.status import Status

HELP = "list the runs in a folder: state, best mIoU, progress, workers and cost, newest first"
EXAMPLE = "sceneray runs s3://bucket/runs"
LOST_AFTER_S = 300.0  # without a sign of life for so long, nobody believes that a run runs
_READERS = 16  # folders looked at at once
_HEADER = ("run", "state", "mIoU", "epochs", "attempts", "workers", "images/s", "cost (wasted)", "updated")
_NUMBERS = (
    "miou", "epoch", "epochs", "step", "steps", "attempts", "workers", "images_per_second", "price_per_hour", "cost",
    "wasted_cost", "cost_per_epoch", "seconds", "wasted_seconds", "redone_steps",
)  # fmt: skip
_TEXTS = ("state", "started_at", "updated_at", "problem")
_KEYS = (*_TEXTS, *_NUMBERS, "nodes")
# Before its first attempt a run folder holds no more than these.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", metavar="RUNS", help="folder of run folders, or one run folder (any URL)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns a row for each run."""
    return runs(args.runs)


def runs(url: str) -> dict[str, Any]:
    """Print the table of the runs directly below `url`, or of the run at `url`; returns all that is known of them.

    Raises ConfigError where there is no run.
    """
    from sceneray import storage
    from sceneray.errors import ConfigError

    url = storage.absolute(url)
    now = datetime.now(UTC)
    below = storage.list_names(url)
    if is_run(below):
        rows = [describe(url, below, now)]
    else:
        folders = [storage.join(url, name) for name in below if not name.startswith(".")]
        with ThreadPoolExecutor(_READERS) as pool:
            rows = [row for row in pool.map(lambda folder: _look(folder, now), folders) if row is not None]
    if not rows:
        raise ConfigError(
            f"no run at {url} or directly below it: a run folder has config.yaml and attempts/. Give the folder that "
            "your runs' settings name (run=FOLDER/NAME)."
        )
    # Newest first; those that tell no time last. Sorting is stable: of equals, by name.
    rows.sort(key=lambda row: -_seconds_since(row["updated_at"], now) if row["updated_at"] else -math.inf, reverse=True)
    tables.show(_HEADER, [_cells(row, now) for row in rows])
    for row in rows:
        if row["problem"] is not None:
            print(f"{row['name']} is damaged: {row['problem']}")
    return {"runs": rows}


def is_run(names: Collection[str]) -> bool:
    """True where a folder with these `names` in it is a run's."""
    return "config.yaml" in names and (bool({"attempts", "status"} & set(names)) or set(names) == {"config.yaml"})


def describe(run_url: str, names: Collection[str], now: datetime) -> dict[str, Any]:
    """One run as plain values: a request for its result, and one for each attempt.

    A run that cannot be read has the state "damaged" and a `problem`.
    """
    from sceneray import storage
    from sceneray.errors import ScenerayError

    row: dict[str, Any] = {"name": storage.basename(run_url), "run": run_url, **dict.fromkeys(_KEYS)}
    try:
        return {**row, **_checked(_facts(run_url, names, now), run_url)}
    except (ScenerayError, OSError, ValueError) as error:
        return {**row, "state": "damaged", "problem": str(error)}


def _look(folder: str, now: datetime) -> dict[str, Any] | None:
    """The row of a folder; None where it is no run's."""
    from sceneray import storage
    from sceneray.errors import StorageError

    try:
        names = storage.list_names(folder)
    except StorageError as error:
        problem = {"state": "damaged", "problem": str(error)}
        return {"name": storage.basename(folder), "run": folder, **dict.fromkeys(_KEYS), **problem}
    return describe(folder, names, now) if is_run(names) else None


def _facts(url: str, names: Collection[str], now: datetime) -> dict[str, Any]:
    from sceneray import status, storage

    statuses = status.read_all(url) if status.FOLDER in names else []
    result = _mapping(storage.join(url, status.RESULT)) if status.RESULT in names else {}
    facts = _of_statuses(statuses, now) if statuses else _without_status(url, names)
    if result:
        told = ("state", "miou", "step", "steps", "images_per_second")
        facts |= {"state": "finished"} | {key: result[key] for key in told if key in result}
        if not statuses:
            facts |= {"attempts": result.get("attempts"), "epoch": facts.get("epochs")}
    return facts


def _of_statuses(statuses: Sequence[Status], now: datetime) -> dict[str, Any]:
    import dataclasses

    from sceneray import costs

    newest = statuses[-1]
    facts = dataclasses.asdict(newest)
    facts |= {key: value for key, value in dataclasses.asdict(costs.account(statuses)).items() if key in _KEYS}
    scores = [status.miou for status in statuses if status.miou is not None]
    state: str = newest.state
    if state == "running" and _seconds_since(newest.updated_at, now) > LOST_AFTER_S:
        state = "lost"
    kept = {key: facts[key] for key in _KEYS if key in facts}
    return {**kept, "state": state, "miou": max(scores, default=None), "attempts": len(statuses)}


def _without_status(url: str, names: Collection[str]) -> dict[str, Any]:
    """What is known of a run before its first status, or of one that an earlier sceneray trained."""
    from sceneray import config, runlog, storage

    facts: dict[str, Any] = {"epochs": config.read_yaml(storage.join(url, "config.yaml")).get("epochs")}
    if "attempts" not in names:
        return {**facts, "state": "prepared", "attempts": 0}
    count = runlog.next_attempt(url) - 1
    last = _mapping(storage.join(url, "attempts", f"{count:04d}.json"))
    started_at = last.get("started_at")
    about = {"workers": last.get("workers"), "started_at": started_at, "updated_at": started_at}
    return {**facts, "state": "unknown", "attempts": count, **about}


def _checked(facts: dict[str, Any], url: str) -> dict[str, Any]:
    """`facts`, each of the kind that it should be; raises StorageError otherwise."""
    from sceneray.errors import StorageError

    for keys, kinds in ((_NUMBERS, (int, float)), (_TEXTS, (str,))):
        for key in keys:
            if not isinstance(facts.get(key), (*kinds, type(None))):
                raise StorageError(f"{url} tells a wrong '{key}': {facts[key]!r}. One of its small files is damaged.")
    return facts


def _mapping(url: str) -> dict[str, Any]:
    from sceneray import storage
    from sceneray.errors import StorageError

    tree = storage.read_json(url)
    if not isinstance(tree, dict):
        raise StorageError(f"{url} must hold a JSON object, got a {type(tree).__name__}. It is damaged.")
    return tree


def _seconds_since(text: str, now: datetime) -> float:
    from sceneray.errors import StorageError

    try:
        then = datetime.fromisoformat(text)
    except ValueError as error:
        raise StorageError(f"its status was written at '{text}', which is no time in ISO 8601.") from error
    # A time without a zone is UTC; a clock that runs ahead is no reason to speak of the future.
    return max(0.0, (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds())


def _cells(row: dict[str, Any], now: datetime) -> list[str]:
    """One line of the table."""
    state, updated = row["state"], "-"
    if row["updated_at"] is not None:
        silent = tables.age(_seconds_since(row["updated_at"], now))
        updated = f"{silent} ago"
        if state == "lost":
            state = f"lost: silent for {silent}"
    cost = "-"
    if row["price_per_hour"] or row["cost"]:
        cost = f"{row['cost']:.2f} ({row['wasted_cost']:.2f})"
    miou = "-" if row["miou"] is None else f"{row['miou']:.4f}"
    epoch = "-" if row["epoch"] is None else f"{row['epoch']:.1f}"
    epochs = "-" if row["epochs"] is None else f"{epoch}/{row['epochs']:g}"
    rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"
    attempts, workers = ("-" if row[key] is None else str(row[key]) for key in ("attempts", "workers"))
    return [row["name"], state, miou, epochs, attempts, workers, rate, cost, updated]


if __name__ == "__main__":
    raise SystemExit(main_of("runs"))
