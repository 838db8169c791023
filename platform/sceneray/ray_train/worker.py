"""What each training process runs, and what it hears from outside while it trains."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.context import get_train_context

from sceneray import storage
from sceneray.board import Wishes
from sceneray.config import TrainSettings
from sceneray.dry_run import dry_run
from sceneray.errors import ScenerayError, SupersededError
from sceneray.training import Runtime, fit

POLL_S = 1.0
EXIT_HANG = 70  # EX_SOFTWARE
NODE_TYPE = "RAY_NODE_TYPE_NAME"  # Ray's autoscaler sets it on every node that it starts
log = logging.getLogger("sceneray.ray_train")


class Listener:
    """What a worker hears from outside its loop, kept ready so that no step waits for a Ray call."""

    def __init__(self, board: Any, rank: int) -> None:
        self.board = board
        self.rank = rank
        self.heard = Wishes(stop=False, leave=False, save=0)
        self.node_goes = False
        self.save_taken = 0  # number of the newest request that the loop has taken up
        self.save_step = 0  # the step it was taken up at
        self.ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="listener").start()

    def _listen(self) -> None:
        preemption = get_train_context().preemption_context
        while not self.ended.wait(POLL_S):
            # Ray's PreemptionWatcher puts it there. The public call for it, get_preemption_info, is a barrier.
            self.node_goes = preemption.preemption_info is not None
            if self.rank == 0:
                try:
                    self.heard = ray.get(self.board.wishes.remote())
                except ray.exceptions.RayError as error:
                    log.warning("the board does not answer, asking again: %s", error)

    def should_stop(self) -> bool:
        """Somebody asked the run to end."""
        return self.heard.stop

    def should_leave(self) -> bool:
        """A node of the group is going, or a larger group is to take over."""
        return self.node_goes or self.heard.leave

    def save_wanted(self, step: int) -> bool:
        """True once for every request to save."""
        number = self.heard.save
        if number in (0, self.save_taken):
            return False
        self.save_step = step  # first: the saver's thread looks at both
        self.save_taken = number
        return True

    def on_saved(self, step: int) -> None:
        """The checkpoint of `step` is committed."""
        if self.save_taken and step >= self.save_step:
            self.board.saved.remote(self.save_taken)


def worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each training process runs."""
    settings = TrainSettings.model_validate(arguments["settings"])
    board = arguments["board"]
    if ray.get(board.failed.remote()):
        return {"state": "failed"}
    context = ray.train.get_context()
    rank = context.get_world_rank()
    listener = Listener(board, rank)
    runtime = Runtime(
        rank=rank,
        world_size=context.get_world_size(),
        workers_here=context.get_local_world_size(),
        device_index=_device_index(settings),
        node=f"{ray.get_runtime_context().get_node_id()} {os.environ.get(NODE_TYPE, 'default')}",
        report=lambda metrics: ray.train.report(metrics),
        progress=lambda row: board.add.remote(row),
        should_stop=listener.should_stop,
        should_leave=listener.should_leave,
        save_wanted=listener.save_wanted,
        on_saved=listener.on_saved,
        on_hang=lambda text: _end_hanging(settings.run, rank, text),
    )
    try:
        return dry_run(settings, runtime) if arguments["check_only"] else fit(settings, runtime)
    except SupersededError as error:
        ray.get(board.superseded.remote(error.attempt, str(error)))
        raise
    except ScenerayError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise
    finally:
        listener.ended.set()


def _end_hanging(run: str, rank: int, text: str) -> None:
    """Leave word in the run folder and end this process: Ray Train then starts the group again."""
    log.error("%s", text)
    url = storage.join(run, "logs", f"hang-{time.time():.0f}-rank-{rank:03d}.txt")
    # A thread of its own, and not for long: the store may be what hangs.
    writer = threading.Thread(target=storage.write_bytes, args=(url, text.encode()), daemon=True)
    writer.start()
    writer.join(timeout=10)
    os._exit(EXIT_HANG)


def _device_index(settings: TrainSettings) -> int:
    if settings.resources.gpu is False:
        return 0
    index = ray.train.torch.get_device().index
    return int(index or 0)
