"""How an attempt begins: from which checkpoint, and under which number."""

from __future__ import annotations

from datetime import UTC, datetime

from sceneray import checkpoint as checkpoints
from sceneray import devices, environment, parallel, runlog, storage
from sceneray.checkpoint import Checkpoint
from sceneray.config import TrainSettings
from sceneray.data.store import Store
from sceneray.retries import patiently
from sceneray.steps import Runtime, TrainState


def newest_checkpoint(settings: TrainSettings, runtime: Runtime) -> tuple[Checkpoint | None, list[str]]:
    """The newest committed checkpoint of the run, the same one on every rank, and lines for the log; None in a new run.

    Its writer may have died before it moved the pointers: that is made up for.
    """
    run, patience_s = settings.run, settings.save.tolerate_s
    device = devices.pick_device(settings.resources.gpu, runtime.device_index)
    said: list[str] = []
    saved = None
    if runtime.rank == 0:
        saved = patiently("looking for checkpoints", lambda: checkpoints.newest(run, said.append), patience_s)
        if saved is not None:
            name, state = checkpoints.name_of(saved.step, int(saved.state["attempt"])), saved.state
            patiently("moving the pointers", lambda: checkpoints.point_both(run, name, state), patience_s)
    found = [0, 0] if saved is None else [saved.step, int(saved.state["attempt"])]
    step, attempt = parallel.share_integers(found, device, runtime.world_size)
    if step and saved is None:
        name = checkpoints.name_of(step, attempt)
        saved = patiently(f"reading {name}", lambda: checkpoints.load(storage.join(run, name)), patience_s)
    return saved, said


def take_attempt(state: TrainState, store: Store) -> int:
    """This worker group's attempt number, the same on every rank; its record is written by rank 0."""
    number = 0
    if state.runtime.rank == 0:
        run = state.settings.run
        about = environment.describe(store.digest)
        record = {
            "from_step": state.step,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "workers": state.runtime.world_size,
            "environment": about,
        }
        patience_s = state.settings.save.tolerate_s
        number = patiently("taking an attempt number", lambda: runlog.claim_attempt(run, record), patience_s)
        environment_url = storage.join(run, "environment.json")
        patiently("writing the environment", lambda: storage.write_json(environment_url, about), patience_s)
    return parallel.share_integers([number], state.device, state.runtime.world_size)[0]
