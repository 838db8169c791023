"""Checking a run before it starts: data, network, one step; nothing is written."""

from __future__ import annotations

import logging
import time
from typing import Any

from sceneray import checkpoint as checkpoints
from sceneray import devices
from sceneray.config import TrainSettings
from sceneray.data.loader import training_loader
from sceneray.errors import CheckpointError
from sceneray.steps import Data, Runtime, create_state, train_step

log = logging.getLogger("sceneray.dry_run")


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
        "workers": runtime.world_size,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "resumes_from_step": saved.step if saved is not None else 0,
    }
