"""What a finished run leaves: RUN/result.json and pictures."""

from __future__ import annotations

from typing import Any

from sceneray import devices, pictures, runlog, storage
from sceneray.status import RESULT
from sceneray.steps import Data, TrainState


def finish(state: TrainState, data: Data, attempt: int) -> dict[str, Any]:
    """Write the run's result and pictures (rank 0) and return the result's core (every rank)."""
    settings, run = state.settings, state.settings.run
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
        "attempts": attempt,
        "images_per_second": rates[len(rates) // 2] if rates else None,
        "peak_memory_bytes": devices.peak_memory(state.device),
    }
    pictures.write_curves(run, rows)
    if settings.log.contact_sheet:
        pictures.write_contact_sheet(run, data.val, settings.log.contact_sheet)
    storage.write_json(storage.join(run, RESULT), result)
    return result
