"""What a run's own records say of its steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sceneray import runlog, storage


def train_rows(run: str) -> dict[str, Any]:
    """ "ends": the wall clock at each logged step; "rows": the metrics rows of the same steps.

    The clock is the one TensorBoard keeps beside every scalar: rows have rates, which average over more than a step.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = storage.join(run, "tensorboard", "attempt-0001")
    with tempfile.TemporaryDirectory() as local:
        for name in storage.list_names(folder):
            Path(local, name).write_bytes(storage.read_bytes(storage.join(folder, name)))
        events = EventAccumulator(local, size_guidance={"scalars": 0})
        events.Reload()
        ends = {event.step: event.wall_time for event in events.Scalars("train/loss")}
    rows = [row for row in runlog.read_metrics(run) if row["kind"] == "train" and row["step"] in ends]
    return {"ends": [ends[row["step"]] for row in rows], "rows": rows}
