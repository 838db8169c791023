"""The training loop: the same for a cluster's job, a trial of a sweep and a unit test; what differs is the Runtime.

Everything that must survive is in the run folder: a fresh process group that calls `fit` with the same settings goes
on from the newest committed checkpoint there.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from sceneray import checkpoint as checkpoints
from sceneray import devices, environment, parallel, pictures, runlog, steps, storage
from sceneray.config import TrainSettings
from sceneray.data import order
from sceneray.data.loader import training_loader
from sceneray.data.store import Store
from sceneray.errors import CheckpointError
from sceneray.steps import Data, Runtime, TrainState, create_state, train_step

__all__ = ["RESULT", "Runtime", "dry_run", "fit"]

RESULT = "result.json"
log = logging.getLogger("sceneray.training")


def fit(settings: TrainSettings, runtime: Runtime) -> dict[str, Any]:
    """Train `settings.run` to its end, or until `runtime.should_stop`, from wherever its checkpoints left it.

    Called on every rank. Returns `state` ("finished" or "stopped"), the steps done and the best val mIoU; the whole
    result is in RUN/result.json. Raises TrainingError where the loss is not finite.
    """
    with runlog.worker_log() as lines:
        data = Data.open(settings)
        state = create_state(settings, runtime, data)
        state.notes += resume(state, data.store)
        attempt = take_attempt(state, data.store)
        lines.folder = runlog.worker_folder(settings.run, attempt, runtime.rank)
        for note in state.notes:
            log.info(note)
            if runtime.rank == 0:
                runtime.progress({"kind": "note", "text": note})
        session = Session(state, data, attempt, lines)
        try:
            finished = session.train()
        finally:
            session.close()
        if not finished:
            return {"state": "stopped", "step": state.step, "steps": state.steps}
        return finish(session)


def resume(state: TrainState, store: Store) -> list[str]:
    """Restore the newest committed checkpoint, the same one on every rank; returns lines for the log."""
    run, runtime = state.settings.run, state.runtime
    said: list[str] = []
    saved = checkpoints.newest(run, said.append) if runtime.rank == 0 else None
    found = [0, 0] if saved is None else [saved.step, int(saved.state["attempt"])]
    step, attempt = parallel.share_integers(found, state.device, runtime.world_size)
    if step == 0:
        return said
    if saved is None:
        saved = checkpoints.load(storage.join(run, checkpoints.name_of(step, attempt)))
    steps.restore(state, saved, store.digest)
    return [*said, f"going on from {saved.url}, step {step} of {state.steps}"]


def take_attempt(state: TrainState, store: Store) -> int:
    """This worker group's attempt number, the same on every rank; its record is written by rank 0."""
    number = 0
    if state.runtime.rank == 0:
        about = environment.describe(store.digest)
        number = runlog.claim_attempt(
            state.settings.run,
            {
                "from_step": state.step,
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "workers": state.runtime.world_size,
                "environment": about,
            },
        )
        storage.write_json(storage.join(state.settings.run, "environment.json"), about)
    return parallel.share_integers([number], state.device, state.runtime.world_size)[0]


@dataclasses.dataclass
class Clock:
    """Seconds spent in training steps, without evaluation and saving."""

    started_at: float = dataclasses.field(default_factory=time.monotonic)
    images: int = 0

    def restart(self) -> None:
        """Begin a new window."""
        self.started_at, self.images = time.monotonic(), 0

    def rate(self) -> float:
        """Images per second in this window."""
        return self.images / max(time.monotonic() - self.started_at, 1e-9)


class Session:
    """One attempt at a run: the loop, and what it writes down."""

    def __init__(self, state: TrainState, data: Data, attempt: int, lines: runlog.Parts) -> None:
        self.state = state
        self.data = data
        self.attempt = attempt
        self.lines = lines
        self.settings = state.settings
        self.metrics: runlog.MetricsLog | None = None
        if state.runtime.rank == 0:
            self.metrics = runlog.MetricsLog(self.settings.run, attempt, self.settings.log.tensorboard)
        self.clock = Clock()
        self.pending: list[Tensor] = []  # totals of the steps since the last drain, still on the device
        self.scored: dict[str, Any] = {}  # val metrics of the current weights, empty between evaluations

    def train(self) -> bool:
        """Run to the end (True) or until somebody asks to stop (False); every way out leaves a checkpoint."""
        state, settings = self.state, self.settings
        size = len(self.data.train)
        evaluations = set(order.evaluation_steps(size, settings.batch_size, state.positions, settings.eval_every))
        batches = training_loader(
            self.data.train,
            settings,
            state.ignore_index,
            state.step,
            state.steps,
            state.runtime.rank,
            state.runtime.world_size,
            pin_memory=state.device.type == "cuda",
        )
        log.info("training on %s, %s", state.device, state.autocast_dtype or torch.float32)
        stop = False
        self.clock.restart()
        while state.step < state.steps and not stop:
            parts = [next(batches) for _ in range(settings.accumulate)]
            self.pending.append(train_step(state, parts, state.runtime.should_stop()))
            self.clock.images += len(order.step_positions(state.step - 1, settings.batch_size, state.positions))
            evaluate = state.step in evaluations
            if evaluate or state.step % settings.log.every_steps == 0:
                stop = self.drain()
            save = settings.save.every_steps is not None and state.step % settings.save.every_steps == 0
            if evaluate:
                self.evaluate()
            if evaluate or save or stop:
                self.save()
                self.clock.restart()
        return state.step == state.steps

    def drain(self) -> bool:
        """Log the steps since the last call; True where a rank asked to stop. The one wait for the device."""
        if not self.pending:
            return False
        totals = torch.stack(self.pending).cpu()
        done = range(self.state.step - len(self.pending), self.state.step)
        self.pending.clear()
        steps.check_finite(self.state, self.data, done, totals)
        rate = self.clock.rate()
        left = (self.state.positions - self.state.step * self.settings.batch_size) / rate
        row = {
            "step": self.state.step,
            "epoch": self.epoch,
            "loss": float(totals[:, 0].sum() / totals[:, 1].sum().clamp(min=1e-12)),
            "lr": min(group["lr"] for group in self.state.optimizer.param_groups),
            "images_per_second": rate,
        }
        if self.metrics is not None:
            self.metrics.add("train", row)
            progress = {"steps": self.state.steps, "epochs": self.settings.epochs, "seconds_left": max(0.0, left)}
            self.state.runtime.progress({"kind": "train", **row, **progress})
        return bool(totals[:, 2].sum() > 0)

    def evaluate(self) -> None:
        """Score the current weights on the val split and report it."""
        result = steps.evaluate(self.state, self.data)
        self.scored = {
            "miou": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            "mean_accuracy": result.mean_accuracy,
        }
        row = {"step": self.state.step, "epoch": self.epoch, **self.scored}
        if self.metrics is not None:
            self.metrics.add("val", {**row, "iou": result.iou})
            self.state.runtime.progress({"kind": "val", **row})
        log.info("step %d: val mIoU %.4f, pixel accuracy %.4f", self.state.step, result.miou, result.pixel_accuracy)

    def save(self) -> None:
        """Commit a checkpoint, move the pointers, remove old ones; then report what was measured on it.

        Metrics are made durable first: what a later attempt supersedes must be known from the checkpoint's step.
        """
        if self.pending:
            self.drain()
        steps.check_weights(self.state)
        self.lines.flush()
        if self.metrics is not None:
            self.metrics.flush()
            content = self.content()
            run = self.settings.run
            name = checkpoints.save(
                run, self.state.model.state_dict(), steps.optimizer_tensors(self.state), content, self.settings
            )
            checkpoints.point(run, "last", name, content)
            if self.scored:
                checkpoints.point(run, "best", name, content, better=True)
            checkpoints.prune(run, self.settings.save.keep, self.attempt)
            log.info("committed %s", name)
        if self.scored:
            self.state.runtime.report({"step": self.state.step, "epoch": self.epoch, **self.scored})
        self.scored = {}

    def content(self) -> dict[str, Any]:
        """What state.json of a checkpoint holds."""
        store = self.data.store
        return {
            "step": self.state.step,
            "position": min(self.state.step * self.settings.batch_size, self.state.positions),
            "seed": self.settings.seed,
            "attempt": self.attempt,
            "metrics": self.scored,
            "store_digest": store.digest,
            "classes": checkpoints.classes_to_json(store.classes),
            "ignore_index": store.ignore_index,
        }

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return min(self.state.step * self.settings.batch_size, self.state.positions) / len(self.data.train)

    def close(self) -> None:
        """Make everything logged so far durable."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None


def finish(session: Session) -> dict[str, Any]:
    """Write the run's result and pictures (rank 0) and return the result's core (every rank)."""
    state, run = session.state, session.settings.run
    if state.runtime.rank != 0:
        return {"state": "finished", "step": state.step, "steps": state.steps}
    best = storage.read_json(storage.join(run, "best"))
    rows = runlog.read_metrics(run)
    rates = sorted(row["images_per_second"] for row in rows if row["kind"] == "train")
    result = {
        "state": "finished",
        "run": run,
        "step": state.step,
        "steps": state.steps,
        "miou": best["miou"],
        "best": best,
        "attempts": session.attempt,
        "images_per_second": rates[len(rates) // 2] if rates else None,
        "peak_memory_bytes": devices.peak_memory(state.device),
    }
    pictures.write_curves(run, rows)
    if session.settings.log.contact_sheet:
        pictures.write_contact_sheet(run, session.data.val, session.settings.log.contact_sheet)
    storage.write_json(storage.join(run, RESULT), result)
    return result


def dry_run(settings: TrainSettings, runtime: Runtime) -> dict[str, Any]:
    """Check data, network and one step without writing to the run folder.

    Takes two steps and times the second (the first pays for start-up). Raises CheckpointError where the run folder
    holds checkpoints of other data.
    """
    data = Data.open(settings)
    state = create_state(settings, runtime, data)
    saved = checkpoints.newest(settings.run, log.warning) if runtime.rank == 0 else None
    if saved is not None and saved.store_digest != data.store.digest:
        raise CheckpointError(f"{saved.url} was trained on other data than {settings.data.store} holds now.")
    batches = training_loader(
        data.train, settings, state.ignore_index, 0, state.steps, runtime.rank, runtime.world_size
    )
    seconds = []
    for _ in range(min(2, state.steps)):
        started_at = time.monotonic()
        totals = train_step(state, [next(batches) for _ in range(settings.accumulate)])
        loss = float(totals[0] / totals[1].clamp(min=1e-12))  # waits for the device
        seconds.append(time.monotonic() - started_at)
    return {
        "state": "checked",
        "steps": state.steps,
        "loss": loss,
        "seconds_per_step": seconds[-1],
        "estimated_seconds": seconds[-1] * state.steps,
        "peak_memory_bytes": devices.peak_memory(state.device),
        "device": str(state.device),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "resumes_from_step": saved.step if saved is not None else 0,
    }
