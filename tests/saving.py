"""What tests of saving share: small snapshots, and a Saver that is closed in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from sceneray import storage
from sceneray.config import TrainSettings
from sceneray.saver import Saved, Saver, Snapshot
from tests.stores import tiny_settings

PATIENCE_S = 60  # a test that waits longer for something hangs
TICK_S = 0.005


def snapshot(step: int, attempt: int = 1, miou: float | None = None) -> Snapshot:
    """A snapshot with one small tensor of each kind, all of the value `step`."""
    value = torch.full((6,), float(step))
    state = {"step": step, "attempt": attempt, "metrics": {} if miou is None else {"miou": miou}}
    return Snapshot({"weight": value}, {"weight/momentum": value.clone()}, {"weight": value.clone()}, state)


def save_settings(run: str, keep: int = 2, tolerate_s: float = 600.0) -> TrainSettings:
    """Settings of a run that is never trained, only saved."""
    return tiny_settings("stores/none", run, f"save={{keep: {keep}, keep_best: 1, tolerate_s: {tolerate_s}}}")


@contextlib.contextmanager
def saving(settings: TrainSettings, flush: Callable[[Saved | None], None] | None = None) -> Iterator[Saver]:
    """A Saver that is closed afterwards; by default its logs are one file in the run folder."""
    log = storage.join(settings.run, "log")
    worker = Saver(settings, flush or (lambda saved: storage.write_bytes(log, str(saved).encode())))
    try:
        yield worker
    finally:
        worker.close()


def take_snapshot(worker: Saver, step: int, miou: float | None = None, attempt: int = 1) -> None:
    """Hand a small snapshot of `step` over."""
    new = snapshot(step, attempt, miou)
    worker.save(new.model, new.optimizer, new.ema, new.state, float(step))


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(TICK_S)
