"""Which checkpoints a run has, and which of them stay. It reads no weights, so it needs no torch.

A checkpoint is a folder RUN/checkpoints/step-00000120-a001: 120 steps done, written by attempt 1 of the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sceneray import storage
from sceneray.errors import CheckpointError, StorageError
from sceneray.storage import Committed

FORMAT = "sceneray-checkpoint"
VERSION = 1
FOLDER = "checkpoints"
POINTERS = ("best", "last")
NEVER_FINISHED = "no manifest: never finished"
_NAME = re.compile(r"step-(\d{8,})-a(\d{3,})")
_READERS = 8  # requests on their way at once


@dataclass(frozen=True)
class Entry:
    """One checkpoint folder, as far as its manifest tells."""

    name: str  # below RUN
    step: int
    attempt: int
    bytes: int  # in all its files
    committed: Committed | None = None  # None: no reader takes it for a checkpoint
    problem: str | None = None  # why it is no committed checkpoint, or what is wrong with it
    miou: float | None = None  # val mIoU of its weights; None where none was measured

    @property
    def unfinished(self) -> bool:
        """True where no manifest stands: its writer is still at it, or ended before it was done."""
        return self.problem == NEVER_FINISHED


def name_of(step: int, attempt: int) -> str:
    """The name below RUN of the checkpoint that `attempt` wrote after `step` steps."""
    return f"{FOLDER}/step-{step:08d}-a{attempt:03d}"


def is_name(url: str) -> bool:
    """True where the last segment of `url` is that of a checkpoint folder."""
    return _NAME.fullmatch(storage.basename(url)) is not None


def names(run: str) -> list[str]:
    """Names below RUN of all checkpoint folders, committed or not, oldest first."""
    return _ordered(storage.list_names(storage.join(run, FOLDER)))


def resolve(url: str) -> str:
    """The folder that `url` means: itself, or where the pointer at `url` leads."""
    url = storage.absolute(url)
    if not storage.is_file(url):
        return url
    return storage.join(url.rsplit("/", 1)[0], _pointed_by(url))


def pointers(run: str) -> dict[str, str]:
    """What RUN/best and RUN/last name, for those of the two that are there.

    Raises CheckpointError where a file of that name is no pointer.
    """
    found = {}
    for pointer in POINTERS:
        with contextlib.suppress(FileNotFoundError):
            found[pointer] = _pointed_by(storage.join(run, pointer))
    return found


def entries(run: str, folders: Mapping[str, int] | None = None) -> list[Entry]:
    """The checkpoint folders of `run`, oldest first; `folders`: those that `sizes` has told the caller already.

    One small request a folder. A folder that cannot be read is an entry with a `problem`.
    """
    listed = sizes(run) if folders is None else folders
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda name: _entry(run, name, listed[name]), listed))


def sizes(run: str) -> dict[str, int]:
    """Bytes in each checkpoint folder that has files, by its name below RUN, oldest first; one listing for all.

    Some S3 servers go on listing a folder for a while when its files are gone; such a one is not among them.
    """
    total: dict[str, int] = defaultdict(int)
    for path, size in storage.walk_files(storage.join(run, FOLDER)):
        total[f"{FOLDER}/{path.partition('/')[0]}"] += size
    return {name: total[name] for name in _ordered(storage.basename(name) for name in total)}


def best_of(committed: Iterable[Entry], keep_best: int) -> list[Entry]:
    """The `keep_best` entries with the highest val mIoU, the earliest of equals; fewer where fewer have one."""
    scored = [entry for entry in committed if entry.miou is not None and math.isfinite(entry.miou)]
    # Sorting is stable and entries come oldest first: of equals the earliest is the one that RUN/best names.
    return sorted(scored, key=lambda entry: -(entry.miou or 0.0))[:keep_best]


def removable(
    every: Sequence[Entry], pointed: Collection[str], keep: int, keep_best: int, attempt: int | None = None
) -> list[Entry]:
    """Those of `every` (oldest first) that go when the newest `keep` and the `keep_best` best-scoring ones stay.

    What is `pointed` at stays, and so does what cannot be read now. A folder without a manifest goes only where its
    writing is surely over: its step and its attempt are both below those of the newest committed one, or it is a save
    of `attempt`, the writer that asks, which began a later one since (a writer saves one after the other).
    """
    committed = [entry for entry in every if entry.committed is not None]
    if not committed:
        return []
    newest = committed[-1]
    kept = {
        entry.name for entry in [*committed[max(0, len(committed) - keep) :], *best_of(committed, keep_best)]
    } | set(pointed)
    own = max((entry.step for entry in committed if entry.attempt == attempt), default=0)

    def is_over(entry: Entry) -> bool:
        given_up = entry.attempt < newest.attempt and entry.step < newest.step
        return entry.unfinished and (given_up or (entry.attempt == attempt and entry.step < own))

    return [e for e in every if e.name not in kept and (e.committed is not None or is_over(e))]


def remove(run: str, name: str) -> None:
    """Remove one checkpoint folder of `run`."""
    # The manifest first: a folder that is half removed must not look whole.
    storage.remove(storage.join(run, name, storage.MANIFEST))
    storage.remove(storage.join(run, name))


def prune(run: str, keep: int, attempt: int, keep_best: int = 1) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints, the `keep_best` best-scoring, and those pointed at.

    Called by the one writer of `attempt`. Nothing is removed where a later attempt has written a checkpoint. Returns
    the names removed; `removable` says which they are.
    """
    listed = sizes(run)
    if len(listed) <= keep or any(_numbers(name)[1] > attempt for name in listed):
        return []
    pointed = pointers(run).values()
    removed = [entry.name for entry in removable(entries(run, listed), set(pointed), keep, keep_best, attempt)]
    for name in removed:
        remove(run, name)
    return removed


def _entry(run: str, name: str, size: int) -> Entry:
    step, attempt = _numbers(name)
    try:
        committed = storage.open_committed(storage.join(run, name))
        if committed is None:
            return Entry(name, step, attempt, size, problem=NEVER_FINISHED)
    except StorageError as error:
        return Entry(name, step, attempt, size, problem=str(error))
    try:
        return Entry(name, step, attempt, size, committed, miou=_miou(committed))
    except StorageError as error:
        return Entry(name, step, attempt, size, committed, problem=str(error))


def _miou(committed: Committed) -> float | None:
    if "miou" in committed.manifest:
        value: Any = committed.manifest["miou"]
    else:  # the first checkpoints of version 1 have it in their state alone
        value = json.loads(committed.read("state.json")).get("metrics", {}).get("miou")
    return float(value) if isinstance(value, int | float) else None


def _pointed_by(url: str) -> str:
    pointer = storage.read_json(url)
    if not isinstance(pointer, dict) or not isinstance(pointer.get("checkpoint"), str):
        raise CheckpointError(f"{url} is a file but no pointer to a checkpoint. Give RUN/best, RUN/last or a folder.")
    name: str = pointer["checkpoint"]
    return name


def _numbers(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(storage.basename(name))
    assert match is not None, f"{name} is no checkpoint's name"
    return int(match[1]), int(match[2])


def _ordered(listed: Iterable[str]) -> list[str]:
    return [f"{FOLDER}/{name}" for name in sorted(filter(_NAME.fullmatch, listed), key=_numbers)]
