"""One rank of a training in a test's own hands: its process group, and its state and batches of the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from sceneray import steps
from sceneray.config import TrainSettings
from sceneray.data.loader import Batch, training_loader
from sceneray.steps import Data, Runtime, TrainState


@contextlib.contextmanager
def process_group(rank: int, world: int, folder: str) -> Iterator[None]:
    """This process as one of `world` ranks that find each other by a file in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    yield
    # Not after an error: leaving the group waits for its collectives, and so for ranks that may never come.
    dist.destroy_process_group()


def first_step(settings: TrainSettings, runtime: Runtime) -> tuple[TrainState, list[Batch]]:
    """A fresh state, and this rank's batches of the first step."""
    data = Data.open(settings)
    state = steps.create_state(settings, runtime, data)
    batches = training_loader(data.train, settings, data.store.ignore_index, 0, 1, runtime.rank, runtime.world_size)
    return state, list(batches)
