"""A writer that dies at any operation of a save: no reader ever sees less than was acknowledged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from sceneray import checkpoint, retention, retries, saver, storage
from sceneray.config import TrainSettings
from sceneray.errors import StorageError
from tests.faulty_files import Died, FaultyStore, dies_at, fails_at, faulty_store, flaky
from tests.saving import save_settings, snapshot

MIOUS = (0.9, 0.5, None, 0.7)  # of the checkpoints that are there already, then of the new one


@pytest.fixture
def store() -> Iterator[FaultyStore]:
    """An empty store that fails as it is told."""
    with faulty_store() as faulty:
        yield faulty


def publish(settings: TrainSettings, step: int, attempt: int = 1, miou: float | None = None) -> str:
    """Save a checkpoint of `step`."""
    return saver.publish(settings.run, snapshot(step, attempt, miou), settings)


def acknowledged(settings: TrainSettings, count: int) -> int:
    """Save `count` checkpoints, the first of them the best; the last one's step."""
    for step in range(1, count + 1):
        publish(settings, step, miou=MIOUS[step - 1])
    return count


def read_whole(url: str) -> checkpoint.Checkpoint:
    """Load a checkpoint; every tensor of it must come from the same save."""
    found = checkpoint.load(url)
    for tensors in (found.model, found.optimizer, found.ema):
        assert all(bool(torch.all(tensor == found.step)) for tensor in tensors.values())
    return found


def check_readers(run: str, least: int, best: int) -> int:
    """What a process that knows nothing but the store reads; the newest step."""
    warnings: list[str] = []
    newest = checkpoint.newest(run, warnings.append)
    assert newest is not None
    assert warnings == []  # nothing that looks whole is damaged
    steps = {entry.name: read_whole(storage.join(run, entry.name)).step for entry in finished(run)}
    assert max(steps.values()) == newest.step
    assert newest.step >= read_whole(storage.join(run, "last")).step >= least
    assert read_whole(storage.join(run, "best")).step == best
    return newest.step


def finished(run: str) -> list[retention.Entry]:
    """The checkpoint folders that have a manifest."""
    return [entry for entry in retention.entries(run) if not entry.unfinished]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_writer_that_dies_anywhere_leaves_whole_checkpoints(store: FaultyStore, count: int) -> None:
    """Dead before or after each operation of a save: readers find at least the last one, and the next attempt heals."""
    settings = save_settings(store.url("run"), keep=1)
    least = acknowledged(settings, count)
    save = partial(publish, settings, count + 1, miou=MIOUS[count])
    for number in store.faults_in(save, dies_at):
        with pytest.raises(Died):
            save()
        assert len(store.operations) >= number
        store.rules.clear()
        newest = check_readers(settings.run, least, best=1)
        publish(settings, newest + 1, attempt=2, miou=0.95)
        publish(settings, newest + 2, attempt=2)
        check_readers(settings.run, newest + 2, best=newest + 1)
        assert checkpoint.names(settings.run) == [
            checkpoint.name_of(newest + 1, 2),
            checkpoint.name_of(newest + 2, 2),
        ]  # fmt: skip  nothing of the dead writer stays
    assert number > 20, "a save takes more operations than that"


def test_pruning_that_dies_anywhere_is_finished_later(store: FaultyStore) -> None:
    """Dead before or after each operation of a prune: what is kept is whole, and the next prune does the rest."""
    settings = save_settings(store.url("run"), keep=9)
    for step in range(1, 5):
        publish(settings, step, miou=MIOUS[step - 1])
    prune = partial(checkpoint.prune, settings.run, 1, 1, 1)
    for _ in store.faults_in(prune, dies_at):
        with pytest.raises(Died):
            prune()
        store.rules.clear()
        check_readers(settings.run, 4, best=1)
        prune()
        assert checkpoint.names(settings.run) == [checkpoint.name_of(1, 1), checkpoint.name_of(4, 1)]


def test_a_fault_anywhere_is_asked_again(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed or unanswered operation, whichever it is, delays a save and changes nothing else."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    settings = save_settings(store.url("run"), keep=1)
    acknowledged(settings, 3)
    before = store.content()
    save = partial(publish, settings, 4, miou=0.95)
    save()
    expected = store.content()
    store.restart(before)
    for _ in store.faults_in(save, fails_at):
        save()
        assert store.raised == {"OSError": 1}
        assert store.content() == expected


def test_a_save_is_repeated_after_a_fault_anywhere(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where asking again is given up at any operation, doing the whole save again ends as if nothing had happened."""
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    settings = save_settings(store.url("run"), keep=1)
    acknowledged(settings, 3)
    save = partial(publish, settings, 4, miou=0.95)
    for _ in store.faults_in(save, fails_at):
        with contextlib.suppress(StorageError):
            save()
        assert store.raised == {"OSError": 1}
        store.rules.clear()
        save()
        check_readers(settings.run, 4, best=4)
        assert [entry.step for entry in finished(settings.run)] == [4]


def test_many_faults_end_in_a_whole_run(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one operation in ten failing, every save that was acknowledged verifies."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    settings = save_settings(store.url("run"), keep=50)
    store.rules = [flaky(seed=7, share=0.1)]
    for step in range(1, 31):
        publish(settings, step, miou=step / 100)
    assert store.raised["ConnectionResetError"] > 30
    store.rules.clear()
    check_readers(settings.run, 30, best=30)
    assert len(finished(settings.run)) == 30


def test_a_store_that_goes_away_is_no_damage(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store stops answering during the search for the newest checkpoint, nothing older is taken for it."""
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    settings = save_settings(store.url("run"), keep=9)
    acknowledged(settings, 3)
    search = partial(checkpoint.newest, settings.run, print)
    for _ in store.faults_in(search, fails_at, moments=("before",)):
        with pytest.raises(StorageError):
            search()
