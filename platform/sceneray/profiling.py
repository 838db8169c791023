"""Where a training step's time goes: a stage breakdown and a torch profiler trace of some steps."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sceneray import storage

STAGES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint")
FIRST_STEP = 3  # the steps before it pay for start-up
STEPS = 10


class Stages:
    """Seconds spent in each stage of a step while `on`; free of cost otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = False
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the enclosed work as `stage`; waits for the device before and after."""
        if not self.on:
            yield
            return
        started_at = self._now()
        with torch.profiler.record_function(f"sceneray:{stage}"):
            yield
        self.seconds[stage] += self._now() - started_at

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


class Profile:
    """Profiles some steps of an attempt; the trace goes to `folder` in Chrome's format (chrome://tracing, Perfetto)."""

    def __init__(self, stages: Stages, folder: str) -> None:
        self.stages = stages
        self.folder = folder
        self.steps = 0
        self.started_at = 0.0
        self.profiler: Any = None

    def step(self) -> dict[str, Any] | None:
        """Call after every step; returns the breakdown once, after the last profiled step."""
        self.steps += 1
        if self.steps == FIRST_STEP:
            self._start()
        elif self.steps == FIRST_STEP + STEPS:
            return self.end()
        return None

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.stages.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.profiler.start()
        self.stages.on = True
        self.started_at = time.monotonic()

    def end(self) -> dict[str, Any] | None:
        """Write the trace and return the breakdown; None where nothing is being profiled."""
        if self.profiler is None:
            return None
        wall_s = time.monotonic() - self.started_at
        self.stages.on = False
        self.profiler.stop()
        steps = max(1, self.steps - FIRST_STEP)
        reduced_s = _all_reduce_s(self.profiler)
        with tempfile.TemporaryDirectory(prefix="sceneray-profile-") as folder:
            path = Path(folder) / "trace.json.gz"
            self.profiler.export_chrome_trace(str(path))
            storage.write_bytes(storage.join(self.folder, path.name), path.read_bytes())
        self.profiler = None
        seconds = {stage: value / steps for stage, value in self.stages.seconds.items()}
        return {"steps": steps, "step_s": wall_s / steps, **seconds, "gradient_all_reduce_s": reduced_s / steps}


def line(found: dict[str, Any]) -> str:
    """The breakdown as one line: share of each stage, and the gradients' all-reduce, which runs during backward."""
    shares = ", ".join(f"{stage} {100 * found[stage] / found['step_s']:.0f} %" for stage in STAGES)
    return (
        f"profile of {found['steps']} steps, {1000 * found['step_s']:.0f} ms each: {shares}; the gradients' all-reduce "
        f"took {1000 * found['gradient_all_reduce_s']:.0f} ms of backward"
    )


def _all_reduce_s(profiler: Any) -> float:
    """Seconds in the collectives that DDP starts during backward."""
    names = ("gloo:all_reduce", "nccl:all_reduce")
    events = [event for event in profiler.key_averages() if event.key.startswith(names)]
    return float(sum(max(event.cpu_time_total, event.device_time_total) for event in events)) / 1e6
