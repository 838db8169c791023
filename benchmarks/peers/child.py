"""One loop in a process of its own, as a user would start it.

    python -m benchmarks.peers.child KIND SETTINGS.yaml OUT.json [SECONDS]

Under torchrun rank 0 writes. `saving` trains with our loop until SECONDS have passed since its first step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.peers import loops
from benchmarks.peers.rows import train_rows
from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.models.pspnet import build_model
from sceneray.steps import Data
from sceneray.training import Runtime, fit

BLOCKING_SAVES = 3


def main() -> None:
    """Run the loop that the command line names and write what it returned."""
    kind, url, out, *rest = sys.argv[1:]
    settings = config.load(TrainSettings, url)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = run(kind, settings, float(rest[0]) if rest else 0.0)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


def run(kind: str, settings: TrainSettings, seconds: float) -> Any:
    """The result of one loop, as JSON values."""
    if kind == "bare":
        return loops.bare(settings)
    if kind.startswith("reference"):
        return loops.reference(settings, channels_last=kind.endswith("channels_last"))
    if kind == "saving":
        return saving(settings, seconds)
    raise SystemExit(f"no loop is called {kind}: bare, reference, reference_channels_last, saving")


def saving(settings: TrainSettings, seconds: float) -> Any:
    """Train until `seconds` have passed since the first step; the rows of the run, when each was written, and what the
    peer's saves took."""
    started_at: list[float] = []

    def late() -> bool:
        started_at.append(time.monotonic())
        return started_at[-1] - started_at[0] > seconds

    fit(settings, Runtime(should_stop=late))
    return {**train_rows(settings.run), "blocking_s": blocking_saves(settings)}


def blocking_saves(settings: TrainSettings) -> list[float]:
    """The peer: seconds that a loop is held which writes weights and momentum to the same store before it goes on."""
    net = build_model(settings.model, len(Data.open(settings).store.classes))
    state = {
        f"{kind}/{name}": p.detach().clone() for kind in ("model", "momentum") for name, p in net.named_parameters()
    }
    seconds = []
    for number in range(BLOCKING_SAVES):
        started_at = time.perf_counter()
        storage.write_bytes(storage.join(settings.run, f"blocking-{number}.safetensors"), safetensors.torch.save(state))
        seconds.append(time.perf_counter() - started_at)
    return seconds


if __name__ == "__main__":
    main()
