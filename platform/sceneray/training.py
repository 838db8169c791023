"""The training loop: the same for a cluster's job, a trial of a sweep and a unit test; what differs is the Runtime.

Everything that must survive is in the run folder: a fresh process group that calls `fit` with the same settings goes
on from the newest committed checkpoint there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from sceneray import checkpoint as checkpoints
from sceneray import devices, parallel, pictures, profiling, runlog, steps, storage
from sceneray.books import Books, Start
from sceneray.config import TrainSettings
from sceneray.data import order
from sceneray.data.loader import Batch, training_loader
from sceneray.liveness import Watchdog
from sceneray.results import finish
from sceneray.retries import patiently
from sceneray.saver import Saver
from sceneray.starting import newest_checkpoint, take_attempt
from sceneray.steps import Data, Runtime, TrainState, create_state, train_step
from sceneray.votes import Votes

__all__ = ["Runtime", "fit"]

STATUS_EVERY_S = 15.0
Ending = Literal["finished", "stopped", "preempted", "over_budget"]
log = logging.getLogger("sceneray.training")


def fit(settings: TrainSettings, runtime: Runtime) -> dict[str, Any]:
    """Train `settings.run` to its end, or until somebody asks to stop, from wherever its checkpoints left it.

    Called on every rank. Returns `state` ("finished", "stopped", "over_budget", or "preempted": saved, to be started
    again elsewhere), the steps done and the best val mIoU; the whole result is in RUN/result.json. Raises TrainingError
    where the loss is not finite, CheckpointError where nothing can be saved.
    """
    with runlog.worker_log() as lines:
        patience_s = settings.save.tolerate_s
        data = patiently("opening the data", lambda: Data.open(settings), patience_s)
        saved, said = newest_checkpoint(settings, runtime)
        state = create_state(settings, runtime, data, fresh=saved is None)
        steps.settle(state)
        state.notes += said
        if saved is not None:
            steps.restore(state, saved, data.store.digest)
            state.notes.append(f"going on from {saved.url}, step {state.step} of {state.steps}")
        attempt = take_attempt(state, data.store)
        lines.folder = runlog.worker_folder(settings.run, attempt, runtime.rank)
        session = Session(state, data, attempt, lines)
        try:
            ending = session.train()
            session.end(ending)
        except BaseException:
            session.books.update(state="failed")
            session.saver.flush_soon()
            raise
        finally:
            session.close()
        if ending != "finished":
            return {"state": ending, "step": state.step, "steps": state.steps}
        return patiently("writing the result", lambda: finish(state, data, attempt), patience_s)


class Session:
    """One attempt at a run: the loop, when it evaluates and saves, and when it ends."""

    def __init__(self, state: TrainState, data: Data, attempt: int, lines: runlog.Parts) -> None:
        self.state = state
        self.data = data
        self.attempt = attempt
        self.settings = state.settings
        nodes = parallel.share_texts(state.runtime.node, state.device, state.runtime.world_size)
        start = Start(state.step, state.steps, self.epoch, nodes)
        self.books = Books(self.settings, state.runtime, attempt, lines, start)
        if state.runtime.rank == 0:
            state.runtime.progress({"kind": "attempt", "attempt": attempt})
        self.saver = Saver(self.settings, self.books.flush, state.device, self.books.note)
        self.votes = Votes(state.device)
        self.scored: dict[str, Any] = {}  # val metrics of the current weights, empty between evaluations
        self.evaluations = 0
        self.window = Window()
        self.saved_at = self.told_at = time.monotonic()
        self.profile: profiling.Profile | None = None
        if self.settings.profile and state.runtime.rank == 0:
            self.profile = profiling.Profile(state.stages)

    def train(self) -> Ending:
        """Run to the end, or until somebody asks to stop or to leave. The state is then ahead of what is saved."""
        state, settings = self.state, self.settings
        for note in [*state.notes, *self.books.about_earlier()]:
            self.books.note(note)
        log.info("training on %s, %s", state.device, state.autocast_dtype or torch.float32)
        size = len(self.data.train)
        evaluations = set(order.evaluation_steps(size, settings.batch_size, state.positions, settings.eval_every))
        batches = self._batches()
        self.window = Window()
        with Watchdog(settings.resources.hang_timeout_s, state.runtime.on_hang) as watchdog:
            if state.step in evaluations and not state.scored:
                self.evaluate(watchdog)  # the attempt before was stopped just here, before it could
                self.save()
            while state.step < state.steps:
                self._step(batches)
                watchdog.beat()
                ending = self._ending()
                evaluate = state.step in evaluations
                if evaluate or ending or state.step % settings.log.every_steps == 0:
                    self.drain()
                if ending:
                    return ending
                due = self._save_is_due()  # asked at every step: a request that meets an evaluation is answered too
                if evaluate:
                    self.evaluate(watchdog)
                if evaluate or due:
                    self.save()
                self._tell()
        return "finished"

    def _batches(self) -> Iterator[Batch]:
        state = self.state
        return training_loader(
            self.data.train,
            self.settings,
            state.ignore_index,
            state.step,
            state.steps,
            state.runtime.rank,
            state.runtime.world_size,
            pin_memory=state.device.type == "cuda",
        )

    def _step(self, batches: Iterator[Batch]) -> None:
        """Wait for this rank's part of the next global batch, and train on it."""
        state, runtime = self.state, self.state.runtime
        waits_from = time.monotonic()
        with state.stages("data"):
            parts = [next(batches) for _ in range(self.settings.accumulate)]
        self.window.data_wait_s += time.monotonic() - waits_from
        if self.settings.log.samples:
            used = [int(position) for part in parts for position in part.positions if position >= 0]
            most = self.settings.batch_size
            self.books.add_samples(
                state.step + 1, parallel.gather_positions(used, most, state.device, runtime.world_size)
            )
        stop = runtime.should_stop() or self._over_budget()
        self.votes.put(train_step(state, parts, stop, runtime.should_leave()))
        self.window.images += len(order.step_positions(state.step - 1, self.settings.batch_size, state.positions))
        if self.profile is not None and self.profile.step():
            self._tell_profile(self.profile)
            self.window = Window()  # making the trace took a while

    def _tell_profile(self, profile: profiling.Profile) -> None:
        """The stage breakdown as a line and a row; the trace as a file."""
        found, trace = profile.end()
        self.books.note(profiling.line(found))
        self.books.add("profile", {"step": self.state.step, **found})
        folder = runlog.attempt_folder(self.settings.run, "profile", self.attempt)
        self.books.add_file(storage.join(folder, profiling.TRACE), trace)

    def _ending(self) -> Ending | None:
        """How the attempt ends after this step, the same on every rank: the votes rode in the step's own all-reduce."""
        totals = self.votes.decided()
        if any(row[2] > 0 for row in totals):
            return "over_budget" if self._over_budget() else "stopped"
        return "preempted" if any(row[3] > 0 for row in totals) else None

    def _over_budget(self) -> bool:
        budget = self.settings.cost.budget
        return budget is not None and self.books.cost() >= budget

    def _save_is_due(self) -> bool:
        """Asked on every rank; the answer of rank 0 counts, because it alone saves."""
        due, step = self.settings.save, self.state.step
        by_step = due.every_steps is not None and step % due.every_steps == 0
        asked = self.state.runtime.rank == 0 and self.state.runtime.save_wanted(step)
        by_time = due.every_s is not None and time.monotonic() - self.saved_at >= due.every_s and not self.saver.busy
        return asked or by_step or by_time

    def _tell(self) -> None:
        """Let who watches from outside know, now and then, that and where this attempt is."""
        self.saver.check()
        if time.monotonic() - self.told_at >= STATUS_EVERY_S:
            self.told_at = time.monotonic()
            self.saver.flush_soon()

    def drain(self) -> None:
        """Log the steps since the last call. The one wait for the device."""
        rows = self.votes.rows()
        if not rows:
            return
        state = self.state
        totals = torch.stack(rows)
        done = range(state.step - len(rows), state.step)
        steps.check_finite(state, self.data, done, totals)
        window, self.window = self.window, Window()
        seconds = window.age_s
        left = (state.positions - state.step * self.settings.batch_size) * seconds / max(1, window.images)
        row = {
            "step": state.step,
            "epoch": self.epoch,
            "loss": float(totals[:, 0].sum() / totals[:, 1].sum().clamp(min=1e-12)),
            "lr": min(group["lr"] for group in state.optimizer.param_groups),
            "images_per_second": window.images / seconds,
            "data_wait_s": window.data_wait_s,
            "checkpoint_stall_s": self.saver.take_stall(),
            "seconds": seconds,
            "memory_bytes": devices.peak_memory(state.device),
        }
        if self.settings.cost.price_per_hour:
            row["cost"] = self.books.cost()
        self.books.seen(row)
        self.books.add("train", row, {"steps": state.steps, "epochs": self.settings.epochs, "seconds_left": left})

    def evaluate(self, watchdog: Watchdog) -> None:
        """Score the current weights on the val split; now and then draw what they see."""

        def alive(_: int) -> None:
            watchdog.beat()
            self._tell()

        result = steps.evaluate(self.state, self.data, alive)
        self.scored = {
            "miou": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            "mean_accuracy": result.mean_accuracy,
        }
        row = {"step": self.state.step, "epoch": self.epoch, **self.scored, "iou": result.iou}
        self.books.scored(result.miou)
        self.books.add("val", row)
        log.info("step %d: val mIoU %.4f, pixel accuracy %.4f", self.state.step, result.miou, result.pixel_accuracy)
        self.evaluations += 1
        every = self.settings.log.pictures_every
        if every is not None and self.evaluations % every == 0 and self.state.runtime.rank == 0:
            self._draw()
        watchdog.beat()
        self.window = Window()

    def _draw(self) -> None:
        """A contact sheet of the current weights."""
        rows, classes = self.settings.log.contact_sheet, self.data.store.classes
        sheet = pictures.sheet_of(self.state.scored_model, self.data.val, classes, rows, self.state.device)
        self.books.add_file(storage.join(self.settings.run, f"pictures/step-{self.state.step:08d}.jpg"), sheet)

    def save(self) -> None:
        """Hand a checkpoint to the saver; report what was measured on it."""
        self.saved_at = time.monotonic()
        if self.state.runtime.rank == 0:
            self.drain()
            steps.check_weights(self.state)
            with self.state.stages("checkpoint"):
                ema = self.state.ema
                self.saver.save(
                    self.state.model.state_dict(),
                    steps.optimizer_tensors(self.state),
                    {} if ema is None else ema.tensors(),
                    self.content(),
                    self.books.age_s,
                )
        else:
            self.saver.flush_soon()
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
            "scaler": self.state.scaler.state_dict(),
        }

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return min(self.state.step * self.settings.batch_size, self.state.positions) / len(self.data.train)

    def end(self, ending: Ending) -> None:
        """Commit where training stands, and how it ended."""
        self.saver.finish()
        if ending != "finished":  # the last step of a finished run was evaluated and saved already
            self.save()
        if self.profile is not None and self.profile.running:
            self._tell_profile(self.profile)
        self.books.update(state=ending)
        self.saver.flush_soon()
        self.saver.finish()

    def close(self) -> None:
        """Make everything logged so far durable, and let go of threads and files."""
        self.saver.close()
        self.books.close()


class Window:
    """What happened since the last row of metrics."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.images = 0
        self.data_wait_s = 0.0

    @property
    def age_s(self) -> float:
        """Its length so far."""
        return max(time.monotonic() - self.began_at, 1e-9)
