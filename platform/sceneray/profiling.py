"""Where a training step's time goes: a stage breakdown and a torch profiler trace of some steps."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

STAGES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint")
FIRST_STEP = 3  # the steps before it pay for start-up
STEPS = 10
TRACE = "trace.json.gz"


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
    """Profiles some steps of an attempt."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.steps = 0
        self.started_at = 0.0
        self.profiler: Any = None

    @property
    def running(self) -> bool:
        """True between the first profiled step and `end`."""
        return self.profiler is not None

    def step(self) -> bool:
        """Call after every step; True after the last profiled one: call `end`."""
        self.steps += 1
        if self.steps == FIRST_STEP:
            self._start()
        return self.steps == FIRST_STEP + STEPS

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.stages.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # acc_events: torch 2.11 warns of a cycle that ends, though there is only one.
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self.profiler.start()
        self.stages.on = True
        self.started_at = time.monotonic()

    def end(self) -> tuple[dict[str, Any], bytes]:
        """The breakdown in seconds, and the trace in Chrome's format (chrome://tracing, Perfetto), packed by gzip."""
        wall_s = time.monotonic() - self.started_at
        self.stages.on = False
        self.profiler.stop()
        steps = max(1, self.steps - FIRST_STEP)
        reduced_s = _all_reduce_s(self.profiler)
        with tempfile.TemporaryDirectory(prefix="sceneray-profile-") as folder:
            path = Path(folder) / TRACE
            self.profiler.export_chrome_trace(str(path))
            trace = path.read_bytes()
        self.profiler = None
        seconds = {stage: value / steps for stage, value in self.stages.seconds.items()}
        return {"steps": steps, "step_s": wall_s / steps, **seconds, "gradient_all_reduce_s": reduced_s / steps}, trace


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
