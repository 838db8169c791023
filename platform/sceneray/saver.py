"""Saving beside training: a snapshot in host memory, committed by a thread of its own.

Training is held for the copy alone. One save is in flight; a newer snapshot waits for it, and only the newest does. A
store that fails is asked again until `save.tolerate_s` have passed without success; then the run ends with an error and
the last committed checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sceneray import checkpoint as checkpoints
from sceneray.config import TrainSettings
from sceneray.errors import CheckpointError, ConflictError, StorageError, SupersededError

log = logging.getLogger("sceneray.saver")

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 15.0
CLOSE_TIMEOUT_S = 60.0

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint before it is written: contiguous tensors in host memory, and what state.json will hold."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]  # empty without an average of the weights
    state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    step: int
    name: str
    seconds: float  # the attempt's age when the snapshot was taken


def publish(run: str, snapshot: Snapshot, settings: TrainSettings) -> str:
    """Commit a checkpoint, then move `last` and, where it was scored, `best`; then remove old ones. Returns its name.

    May be repeated after a failure anywhere inside: every step of it is idempotent. Raises SupersededError where a
    later attempt has taken over.
    """
    state = snapshot.state
    name = checkpoints.save(run, snapshot.model, snapshot.optimizer, state, settings, snapshot.ema or None)
    if not checkpoints.point_both(run, name, state):
        raise SupersededError(
            f"a later attempt has taken over {run}; attempt {state['attempt']} saved {name}, moved nothing and ends.",
            state["attempt"],
        )
    checkpoints.prune(run, settings.save.keep, state["attempt"], settings.save.keep_best)
    return name


class HostBuffers:
    """Copies of tensors in host memory; their memory is used again by later copies."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: list[dict[str, Tensor]] = []

    def copy(self, tensors: Tensors) -> dict[str, Tensor]:
        """Contiguous copies of `tensors`. From a GPU they are under way until `torch.cuda.synchronize`."""
        buffers = self.free.pop() if self.free else {}
        for name, tensor in tensors.items():
            buffer = buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
            buffers[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return {name: buffers[name] for name in tensors}

    def give_back(self, buffers: dict[str, Tensor]) -> None:
        """Let a later copy use this memory."""
        self.free.append(buffers)


class Saver:
    """The background half of a run's saving, on one rank. Rank 0 commits checkpoints, every rank its logs.

    `flush` makes logs and metrics durable; it runs before every commit, and alone at `flush_soon`.
    """

    def __init__(
        self,
        settings: TrainSettings,
        flush: Callable[[Saved | None], None],
        device: torch.device | None = None,
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        self.settings = settings
        self.flush = flush
        self.tell = tell  # hears when saving begins to fail, and when it works again
        self.device = device or torch.device("cpu")
        self.stall_s = 0.0  # how long training was held by saving, since `take_stall`
        self.saved: Saved | None = None
        self.faults = 0  # failed attempts at saving, so far
        self._buffers = {name: HostBuffers(self.device.type == "cuda") for name in ("model", "optimizer", "ema")}
        self._wake = threading.Condition()
        self._waiting: tuple[Snapshot, float] | None = None
        self._job: tuple[Snapshot, float] | None = None  # on its way
        self._flush_wanted = False
        self._working = False
        self._closing = False
        self._error: BaseException | None = None
        self._failing_since: float | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="saver")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while a checkpoint is on its way."""
        return self._job is not None or self._waiting is not None

    def save(self, model: Tensors, optimizer: Tensors, ema: Tensors, state: dict[str, Any], seconds: float) -> None:
        """Take a snapshot now and commit it in the background. `seconds`: the attempt's age."""
        started_at = time.monotonic()
        self.check()
        snapshot = Snapshot(
            self._buffers["model"].copy(model),
            self._buffers["optimizer"].copy(optimizer),
            self._buffers["ema"].copy(ema),
            state,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._wake:
            self._queue(snapshot, seconds)
            self._wake.notify_all()
        self.stall_s += time.monotonic() - started_at

    def take_stall(self) -> float:
        """Seconds that training was held by saving since the last call."""
        stall, self.stall_s = self.stall_s, 0.0
        return stall

    def flush_soon(self) -> None:
        """Make logs and metrics durable in the background."""
        with self._wake:
            self._flush_wanted = True
            self._wake.notify_all()

    def check(self) -> None:
        """Raise what ended saving for good, if anything did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until everything handed over is committed. Raises CheckpointError where it cannot be."""
        started_at = time.monotonic()
        with self._wake:
            self._wake.wait_for(lambda: self._error is not None or not self._has_work())
        self.stall_s += time.monotonic() - started_at
        self.check()

    def close(self) -> None:
        """Commit what was handed over, without asking a failing store again, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _queue(self, new: Snapshot, seconds: float) -> None:
        """Put `new` in line. One waits at most: the newer one, unless only the older one was scored."""
        if self._waiting is not None:
            old, _ = self._waiting
            if not _overtakes(new, old):
                self._reuse(new)
                return
            log.info("the snapshot of step %d was overtaken by that of step %d", old.state["step"], new.state["step"])
            self._reuse(old)
        self._waiting = (new, seconds)

    def _is_overtaken(self, job: tuple[Snapshot, float] | None) -> bool:
        """True where a failing save is given up for the one that waits; a scored one never is: `best` may be its."""
        return self._waiting is not None and (job is None or not job[0].state["metrics"])

    def _has_work(self) -> bool:
        return self._working or self._waiting is not None or self._flush_wanted

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._waiting is not None or self._flush_wanted)
                if self._waiting is None and not self._flush_wanted:
                    return  # closing, and nothing is left
                job, self._waiting, self._flush_wanted = self._waiting, None, False
                self._job, self._working = job, True
            try:
                self._persist(job)
            except BaseException as error:  # noqa: BLE001  raised in the training thread, by `check`
                self._error = error
            with self._wake:
                self._job, self._working = None, False
                if job is not None:
                    self._reuse(job[0])
                self._wake.notify_all()
            if self._error is not None:
                return

    def _persist(self, job: tuple[Snapshot, float] | None) -> None:
        """Flush, and commit `job`; again after a fault, until it is done, overtaken or hopeless."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                if job is not None:
                    self._commit(*job)
                self.flush(self.saved)
                if self._failing_since is not None:
                    self.tell(f"saving works again, after {time.monotonic() - self._failing_since:.0f} s")
                    self._failing_since = None
                return
            except ConflictError:
                raise  # an answer, not a fault
            except StorageError as error:
                self._tolerate(error)
            with self._wake:
                if self._wake.wait_for(lambda: self._closing or self._is_overtaken(job), timeout=wait_s):
                    return  # the run ends, or a newer snapshot is there
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _commit(self, snapshot: Snapshot, seconds: float) -> None:
        # Metrics first: what a later attempt supersedes must be known from the checkpoint's step.
        self.flush(self.saved)
        name = publish(self.settings.run, snapshot, self.settings)
        self.saved = Saved(snapshot.state["step"], name, seconds)
        log.info("committed %s", name)

    def _tolerate(self, error: StorageError) -> None:
        """Count a fault; raises CheckpointError once saving has failed for too long."""
        self.faults += 1
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self.tell(f"saving fails, training goes on for {self.settings.save.tolerate_s:g} s: {error}")
        failing_s = now - self._failing_since
        log.warning("saving fails since %.0f s, training goes on: %s", failing_s, error)
        if failing_s >= self.settings.save.tolerate_s:
            last = "This attempt has committed none"
            if self.saved is not None:
                last = f"The last committed checkpoint is {self.saved.name}"
            raise CheckpointError(
                f"saving failed for {failing_s:.0f} s (save.tolerate_s is {self.settings.save.tolerate_s:g}): {error} "
                f"{last}. Mend the store, then give the same command."
            ) from error

    def _reuse(self, snapshot: Snapshot) -> None:
        for name in ("model", "optimizer", "ema"):
            self._buffers[name].give_back(getattr(snapshot, name))


def _overtakes(new: Snapshot, old: Snapshot) -> bool:
    """A newer snapshot takes the place of an older one, but only a scored one that of a scored one.

    Only a scored checkpoint can become `best`.
    """
    return bool(new.state["metrics"]) or not old.state["metrics"]
