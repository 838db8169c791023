"""What stands still without dying: noticed by its lack of progress, ended, and started again from what is saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sceneray import config, runlog, storage
from tests.commands import Command, command_line, descendants, same_bits
from tests.stores import tiny_settings

pytestmark = pytest.mark.chaos
HANG_S = 12


@pytest.fixture
def thaw() -> Iterator[list[int]]:
    """Processes that a test stopped: whatever happens, they go on, so that they can be ended."""
    frozen: list[int] = []
    yield frozen
    for pid in frozen:
        if command_line(pid):
            os.kill(pid, signal.SIGCONT)


def settings_of(store: str, run: str, *overrides: str) -> config.TrainSettings:
    """A run of 60 steps that is thought to hang after HANG_S without progress."""
    resources = f"resources={{gpu: false, hang_timeout_s: {HANG_S}, start_timeout_s: 60}}"
    length = ("epochs=10", "eval_every=10", "log.contact_sheet=0", "augment.crop=[96, 128]")
    return tiny_settings(store, run, resources, *length, "save={every_steps: 5}", *overrides)


def freeze(pids: list[int], frozen: list[int]) -> None:
    """Stop processes without ending them."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        frozen.append(pid)


@pytest.mark.slice
def test_a_silent_worker_is_replaced(store: str, tmp_path: Path, thaw: list[int]) -> None:
    """One of two workers is stopped in mid-run: the other, stuck in a collective, says where it stands and ends; the
    group starts again, and the result is that of an undisturbed run."""
    from jobs.train import train

    clean, run = str(tmp_path / "clean"), str(tmp_path / "run")
    train(settings_of(store, clean, "workers=2"))
    command = Command(settings_of(store, run, "workers=2"), tmp_path)
    command.until(lambda: storage.is_file(f"{run}/last"))
    freeze(command.workers()[:1], thaw)
    assert command.wait() == 0, command.text()
    assert len(runlog.attempts(run)) == 2
    left = [name for name in storage.list_names(f"{run}/logs") if name.startswith("hang-")]
    assert left
    text = storage.read_bytes(f"{run}/logs/{left[0]}").decode()
    assert text.startswith("no progress for")
    assert "train_step" in text
    assert same_bits(clean, run)


def test_a_lone_silent_worker_is_replaced(store: str, tmp_path: Path, thaw: list[int]) -> None:
    """With one worker there is no other to notice: Ray's own look at it does, after the same time."""
    run = str(tmp_path / "run")
    command = Command(settings_of(store, run, "workers=1"), tmp_path)
    command.until(lambda: storage.is_file(f"{run}/last"))
    freeze(command.workers(), thaw)
    assert command.wait() == 0, command.text()
    assert len(runlog.attempts(run)) == 2


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_dead_or_stuck_loader_restarts_the_group(
    store: str, tmp_path: Path, thaw: list[int], blow: signal.Signals
) -> None:
    """A decoding process that dies is an error of its worker, one that hangs is no progress: both restart the group."""
    run = str(tmp_path / "run")
    command = Command(settings_of(store, run, "workers=1", "data.loader_workers=1"), tmp_path)
    command.until(lambda: storage.is_file(f"{run}/last"))
    (worker,) = command.workers()
    loaders = [pid for pid in descendants(worker) if "spawn_main" in command_line(pid)]
    if blow == signal.SIGKILL:
        os.kill(loaders[0], signal.SIGKILL)
    else:
        freeze(loaders, thaw)
    assert command.wait() == 0, command.text()
    assert len(runlog.attempts(run)) == 2
