"""Saving beside training: whatever the store does, training goes on, and what was committed is whole."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest
import torch

from sceneray import checkpoint, retention, retries, saver, storage
from sceneray.errors import CheckpointError, SupersededError
from sceneray.saver import Saved
from tests.faulty_files import Died, FaultyStore, away, dies_at, fails_at, faulty_store, flaky, refuses
from tests.saving import PATIENCE_S, TICK_S, save_settings, saving, snapshot, take_snapshot, wait_for


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """An empty store that fails as it is told; nobody waits long before asking it again."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(saver, "FIRST_WAIT_S", TICK_S)
    monkeypatch.setattr(saver, "LONGEST_WAIT_S", TICK_S)
    with faulty_store() as faulty:
        yield faulty


def committed(run: str) -> list[int]:
    """The steps of the run's committed checkpoints; each of them is read and must be whole."""
    steps = []
    for entry in retention.entries(run):
        if not entry.unfinished:
            found = checkpoint.load(storage.join(run, entry.name))
            assert all(bool(torch.all(t == found.step)) for t in (*found.model.values(), *found.ema.values()))
            steps.append(found.step)
    return steps


def pointed(run: str, pointer: str) -> int:
    """The step of the checkpoint that RUN/last or RUN/best leads to."""
    return checkpoint.load(storage.join(run, pointer)).step


def test_everything_handed_over_is_committed(store: FaultyStore) -> None:
    """After `finish` the newest snapshot is committed and pointed at, and the logs know of it."""
    run = store.url("run")
    with saving(save_settings(run, keep=9)) as worker:
        for step, miou in [(1, 0.5), (2, None), (3, 0.4)]:
            take_snapshot(worker, step, miou)
            worker.finish()
        assert worker.saved == Saved(3, checkpoint.name_of(3, 1), 3.0)
        assert not worker.busy
    assert committed(run) == [1, 2, 3]
    assert (pointed(run, "last"), pointed(run, "best")) == (3, 1)
    assert storage.read_bytes(storage.join(run, "log")) == str(worker.saved).encode()
    assert worker.faults == 0


def test_training_goes_on_while_the_store_hangs(store: FaultyStore) -> None:
    """While one save hangs `save` returns; of what came meanwhile the newest is committed, with the weights it had."""
    run = store.url("run")
    with saving(save_settings(run, keep=9)) as worker:
        with store.held("pipe_file", "/model.safetensors") as hold:
            take_snapshot(worker, 1)
            assert hold.arrived.wait(PATIENCE_S)
            for step in range(2, 6):
                take_snapshot(worker, step)
            new = snapshot(6)
            worker.save(new.model, new.optimizer, new.ema, new.state, 6.0)
            for tensors in (new.model, new.optimizer, new.ema):
                for tensor in tensors.values():
                    tensor.fill_(-1.0)  # the next training step
            assert worker.busy
            assert checkpoint.newest(run, print) is None
        worker.finish()
    assert committed(run) == [1, 6]


def test_a_scored_snapshot_is_not_overtaken_by_an_unscored_one(store: FaultyStore) -> None:
    """What an evaluation has scored waits its turn; only a newer scored one takes its place."""
    run = store.url("run")
    with saving(save_settings(run, keep=9)) as worker:
        for first, scores in [(1, {2: 0.5, 3: None, 4: None}), (10, {11: 0.6, 12: None, 13: 0.7})]:
            with store.held("pipe_file", "/model.safetensors") as hold:
                take_snapshot(worker, first)
                assert hold.arrived.wait(PATIENCE_S)
                for step, miou in scores.items():
                    take_snapshot(worker, step, miou)
            worker.finish()
    assert committed(run) == [1, 2, 10, 13]
    assert pointed(run, "best") == 13


def test_a_scored_snapshot_that_fails_is_not_dropped_for_an_unscored_one(store: FaultyStore) -> None:
    """A scored snapshot is tried until it is committed although an unscored one has come since."""
    run = store.url("run")
    with saving(save_settings(run, keep=9)) as worker:
        store.rules = [away]
        take_snapshot(worker, 1, 0.5)
        wait_for(lambda: worker.faults > 0)
        take_snapshot(worker, 2)
        tried = worker.faults
        wait_for(lambda: worker.faults > tried + 1)
        store.rules = []
        worker.finish()
    assert committed(run) == [1, 2]
    assert pointed(run, "best") == 1


def test_a_failing_snapshot_gives_way_to_a_newer_one(store: FaultyStore) -> None:
    """While the store is away the newest snapshot is the one that is tried."""
    run = store.url("run")
    with saving(save_settings(run, keep=9)) as worker:
        store.rules = [away]
        for step in (1, 2, 3):
            take_snapshot(worker, step)
            tried = worker.faults
            wait_for(lambda tried=tried: worker.faults > tried + 1)
        store.rules = []
        worker.finish()
        assert worker.faults > 3
    assert committed(run) == [3]


def test_a_fault_at_any_operation_is_survived(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever operation of a save fails or is not answered, the save is done again and ends whole."""
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    run = store.url("run")
    settings = save_settings(run, keep=1)
    for step in (1, 2):
        saver.publish(run, snapshot(step, miou=0.9 / step), settings)

    def save() -> saver.Saver:
        with saving(settings) as worker:
            take_snapshot(worker, 3, 0.95)
            worker.finish()
        return worker

    for number in store.faults_in(save, fails_at):
        worker = save()
        assert store.raised == {"OSError": 1}
        # A prune leaves a checkpoint alone that it cannot read now; that alone is no fault.
        assert worker.faults == 1 or store.operations[number - 1].path.endswith("/manifest.json")
        store.rules.clear()
        assert committed(run)[-1:] == [3]
        assert (pointed(run, "last"), pointed(run, "best")) == (3, 3)


def test_many_faults_are_counted_and_survived(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a share of all operations failing every checkpoint is committed, and the faults are counted."""
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    run = store.url("run")
    store.rules = [flaky(seed=3, share=0.15)]
    with saving(save_settings(run, keep=50)) as worker:
        for step in range(1, 21):
            take_snapshot(worker, step, step / 100)
            worker.finish()
    assert worker.faults > 0
    store.rules = []
    assert committed(run) == list(range(1, 21))
    assert (pointed(run, "last"), pointed(run, "best")) == (20, 20)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "No space left"), (errno.EACCES, "is not permitted"), (errno.EROFS, "Read-only")],
)
def test_a_store_that_takes_nothing_ends_the_run(store: FaultyStore, number: int, says: str) -> None:
    """A full disk or a missing right ends in an error with the cause and the last committed checkpoint; it is whole."""
    run = store.url("run")
    settings = save_settings(run, keep=9, tolerate_s=0.05)
    with saving(settings) as worker:
        take_snapshot(worker, 1, 0.5)
        worker.finish()
        store.rules = [refuses(number)]
        take_snapshot(worker, 2, 0.6)
        with pytest.raises(CheckpointError, match=f"(?s){says}.*last committed checkpoint is {worker.saved.name}"):
            worker.finish()
        with pytest.raises(CheckpointError, match="Mend the store"):
            take_snapshot(worker, 3)  # training is told at its next save
        assert worker.faults > 1  # it was not the first fault that ended the run
    store.rules = []
    assert committed(run) == [1]
    assert (pointed(run, "last"), pointed(run, "best")) == (1, 1)


def test_a_disk_that_fills_up_anywhere_leaves_no_half_checkpoint(store: FaultyStore) -> None:
    """Whichever write is the first that finds no space, readers find whole checkpoints, at least the last one."""
    run = store.url("run")
    settings = save_settings(run, keep=1, tolerate_s=0.0)
    saver.publish(run, snapshot(1, miou=0.5), settings)
    before = store.content()
    store.restart(before)
    saver.publish(run, snapshot(2, miou=0.6), settings)
    writes = [operation.number for operation in store.operations if operation.kind == "pipe_file"]
    full = refuses(errno.ENOSPC, ("pipe_file",))
    for first in writes:
        store.restart(before, lambda now, op, first=first: full(now, op) if op.number >= first else None)
        with saving(settings, lambda _: None) as worker:
            take_snapshot(worker, 2, 0.6)
            with pytest.raises(CheckpointError, match="This attempt has committed none"):
                worker.finish()
        store.rules = []
        steps = committed(run)
        assert set(steps) in ({1}, {1, 2})
        newest = checkpoint.newest(run, print)
        assert newest is not None
        assert newest.step == steps[-1] >= pointed(run, "last") >= pointed(run, "best")
        saver.publish(run, snapshot(3, attempt=2, miou=0.7), settings)
        assert committed(run) == [3]


def test_a_superseded_run_is_told(store: FaultyStore) -> None:
    """Where a later attempt has taken over, saving ends with that answer and is not tried again."""
    run = store.url("run")
    settings = save_settings(run)
    saver.publish(run, snapshot(5, attempt=2), settings)
    with saving(settings) as worker:
        take_snapshot(worker, 6, attempt=1)
        with pytest.raises(SupersededError, match="a later attempt has taken over"):
            worker.finish()
        assert worker.faults == 0
    assert pointed(run, "last") == 5


def test_what_ends_the_thread_is_raised_in_training(store: FaultyStore) -> None:
    """An error that is no fault of the store is not tried again and reaches the training thread."""
    with saving(save_settings(store.url("run"))) as worker:
        store.rules = [dies_at(3, "before")]
        take_snapshot(worker, 1)
        with pytest.raises(Died):
            worker.finish()
        with pytest.raises(Died):
            worker.check()


def test_finish_waits_for_a_flush_under_way(store: FaultyStore) -> None:
    """`finish` returns after the flush that was asked for before is done, not while it is on its way."""
    begun, finishing = threading.Event(), threading.Event()
    done: list[Saved | None] = []

    def flush(saved: Saved | None) -> None:
        begun.set()
        assert finishing.wait(PATIENCE_S)
        threading.Event().wait(TICK_S)  # whoever does not wait for this is through by now
        done.append(saved)

    with saving(save_settings(store.url("run")), flush) as worker:
        worker.flush_soon()
        assert begun.wait(PATIENCE_S)
        finishing.set()
        worker.finish()
        assert done == [None]


def test_closing_commits_what_waits(store: FaultyStore) -> None:
    """`close` ends the thread after everything that was handed over is committed."""
    run = store.url("run")
    with saving(save_settings(run)) as worker:
        with store.held("pipe_file", "/manifest.json") as hold:
            take_snapshot(worker, 1)
            assert hold.arrived.wait(PATIENCE_S)
            take_snapshot(worker, 2)
            closing = threading.Thread(target=worker.close)
            closing.start()
            wait_for(lambda: worker._closing)
        closing.join()
    assert committed(run) == [1, 2]


def test_closing_does_not_wait_for_a_store_that_is_away(store: FaultyStore) -> None:
    """`close` gives up what a failing store does not take, ends the thread, and leaves no half checkpoint."""
    run = store.url("run")
    with saving(save_settings(run)) as worker:
        take_snapshot(worker, 1)
        worker.finish()
        store.rules = [away]
        take_snapshot(worker, 2, 0.5)
        wait_for(lambda: worker.faults > 0)
        take_snapshot(worker, 3)
        worker.close()
        assert not worker._thread.is_alive()
    store.rules = []
    assert committed(run) == [1]
