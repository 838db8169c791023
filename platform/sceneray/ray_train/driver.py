"""The driver's side of a run: it starts worker groups, shows their progress, and starts them again elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.callback import ControllerCallback  # Ray's only hook before a resize
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sceneray import errors, storage
from sceneray.board import Board
from sceneray.config import TrainSettings
from sceneray.errors import Interrupted, ScenerayError, TrainingError
from sceneray.liveness import FIRST_BEAT
from sceneray.ray_train import placement
from sceneray.ray_train.worker import worker
from sceneray.run_folder import check_rights, prepare_run, with_full_paths
from sceneray.status import RESULT

POLL_S = 1.0
THREAD = "ray-train"
ABANDON_TIMEOUT_S = 10.0
log = logging.getLogger("sceneray.ray_train")

Progress = Callable[[dict[str, Any]], None]


def launch(settings: TrainSettings, on_progress: Progress, check_only: bool = False) -> dict[str, Any]:
    """Train on the Ray that this process is connected to; returns RUN/result.json.

    Ctrl-C asks the workers to save and leave, then raises Interrupted; a second one leaves at once. With `check_only`
    nothing is written: workers are placed and take one step (`sceneray.dry_run`).
    """
    if check_only:
        settings = with_full_paths(settings)
        check_rights(settings.run)
    else:
        settings = prepare_run(settings)
        done = storage.join(settings.run, RESULT)
        if storage.is_file(done):
            log.warning("%s is finished already; nothing to do", settings.run)
            return dict(storage.read_json(done))
    use_gpu = placement.use_gpu(settings)
    placement.check(settings, use_gpu)
    group = Group(settings, use_gpu, on_progress, check_only)
    while (outcome := group.run())["state"] == "preempted" and not group.stopping:
        group.count_preemption()
    step = f"step {outcome.get('step')} of {outcome.get('steps')}"
    if outcome["state"] == "over_budget":
        raise Interrupted(
            f"stopped at {step}; saved: the run has cost its cost.budget of {settings.cost.budget:g}. Raise it and "
            "give the same command."
        )
    if outcome["state"] in ("stopped", "preempted"):
        raise Interrupted(f"stopped at {step}; saved. The same command goes on from there.")
    return outcome


class Group:
    """The worker groups of one launch, one after the other, seen from the driver."""

    def __init__(self, settings: TrainSettings, use_gpu: bool, on_progress: Progress, check_only: bool) -> None:
        self.settings = settings
        self.use_gpu = use_gpu
        self.on_progress = on_progress
        self.check_only = check_only
        self.preemptions = 0
        self.stopping = False
        self.asked_to_leave = False
        self.outgrown_since: float | None = None

    def count_preemption(self) -> None:
        """The group left a node that is going. Raises TrainingError where that was once too often."""
        if self.asked_to_leave:
            return
        self.preemptions += 1
        limit = self.settings.resources.max_preemptions
        if 0 <= limit < self.preemptions:
            raise TrainingError(
                f"{self.preemptions} times a node was taken away, and resources.max_preemptions is {limit}. Everything "
                "is saved; the same command goes on."
            )

    def run(self) -> dict[str, Any]:
        """Start a worker group and show its progress until it ends; Ctrl-C becomes a wish to stop."""
        self.asked_to_leave = False
        # On the driver's node, as Ray Train's controller: on any other the board could be lost, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        most = self.settings.max_workers
        if self.settings.elastic and placement.draining_nodes():
            # Ray's elastic policy counts draining nodes as room, and then waits for workers that nothing can start
            # there.
            room = placement.count_room(self.settings, self.use_gpu)
            most = min(most, max(room, self.settings.min_workers))
        # Ray wants a folder for a record that nobody reads. Not in the bucket: where that fails, Ray must not.
        with tempfile.TemporaryDirectory(prefix="sceneray-ray-", ignore_cleanup_errors=True) as folder:
            trainer = _trainer(self.settings, self.use_gpu, board, self.check_only, most, folder)
            return self._follow(trainer, board, most)

    def _follow(self, trainer: ray.train.torch.TorchTrainer, board: Any, most: int) -> dict[str, Any]:
        """Ray Train in a thread beside this one, which shows progress and hears Ctrl-C."""
        outcome: dict[str, Any] = {}
        # An event, not join(): in Python 3.11 a Ctrl-C inside join(timeout) marks a running thread as ended.
        ended = threading.Event()

        def work() -> None:
            try:
                outcome["value"] = trainer.fit().return_value
            # Handed to the main thread. SystemExit is how Ray's shutdown ends a thread that waits for it.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                outcome["error"] = error
            finally:
                ended.set()

        threading.Thread(target=work, daemon=True, name=THREAD).start()
        last_look = False
        try:
            while not last_look:
                try:
                    last_look = ended.wait(POLL_S)
                    self._look(board, most)
                except KeyboardInterrupt:
                    if self.stopping:
                        raise
                    self.stopping, last_look = True, False
                    self.on_progress({"kind": "stopping"})
                    board.request_stop.remote()
        finally:
            if not ended.is_set():
                _abandon(board, ended)
        if "error" in outcome:
            raise TrainingError(_explain(outcome["error"])) from outcome["error"]
        return dict(outcome["value"])

    def _look(self, board: Any, most: int) -> None:
        """Show what workers wrote on the board.

        Raises what ended them for good, and TrainingError where none starts.
        """
        rows, failure, unseen_s = ray.get(board.take.remote())
        for row in rows:
            self.on_progress(row)
        if failure is not None:
            raise _error(*failure)
        if unseen_s > self.settings.resources.place_timeout_s:
            missing = placement.shortage(self.settings, self.use_gpu)
            raise TrainingError(f"no worker has run for {unseen_s:.0f} s (resources.place_timeout_s). {missing}")
        if most < self.settings.max_workers:
            self._ask_for_room(board, most)

    def _ask_for_room(self, board: Any, most: int) -> None:
        """A group that was kept small while a node drained: let it leave for a larger one once there is room."""
        if placement.count_room(self.settings, self.use_gpu) <= most or placement.draining_nodes():
            self.outgrown_since = None
        elif self.outgrown_since is None:
            self.outgrown_since = time.monotonic()
        elif time.monotonic() - self.outgrown_since > self.settings.resources.resize_check_s:
            self.outgrown_since, self.asked_to_leave = None, True
            board.request_leave.remote()


def _abandon(board: Any, ended: threading.Event) -> None:
    """End the controller, and its workers with it, and wait for the thread that waits for it.

    A thread that still waits inside Ray while the process leaves Ray can take the process with it (SIGSEGV, in place of
    the exit code).
    """
    # Where the board itself is lost, what made us leave is the error to tell.
    with contextlib.suppress(ray.exceptions.RayError):
        controller = ray.get(board.controller_handle.remote(), timeout=ABANDON_TIMEOUT_S)
        if controller is not None:
            ray.kill(controller)
            ended.wait(ABANDON_TIMEOUT_S)


class IntroduceController(ControllerCallback):  # type: ignore[misc]  # Ray has no types
    """Runs in Ray Train's controller: leaves its handle on the board, since `fit` shows it to nobody."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002  Ray's signature
        """Called once, before any worker is asked for."""
        ray.get(self.board.introduce_controller.remote(ray.get_runtime_context().current_actor))


class SaveBeforeResize(ControllerCallback):  # type: ignore[misc]  # Ray has no types
    """Runs in Ray Train's controller: before a worker group ends to make place for another one, it saves."""

    def __init__(self, board: Any, timeout_s: float) -> None:
        self.board = board
        self.timeout_s = timeout_s

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:  # noqa: ARG002  Ray's signature
        """Ask for a checkpoint and wait until it is committed, nobody is there to save, or the time is up."""
        gives_up_at = time.monotonic() + self.timeout_s
        number = ray.get(self.board.request_save.remote())
        while time.monotonic() < gives_up_at and ray.get(self.board.answer.remote(number)) == "waiting":
            time.sleep(POLL_S / 4)


def _trainer(
    settings: TrainSettings, use_gpu: bool, board: Any, check_only: bool, most: int, folder: str
) -> ray.train.torch.TorchTrainer:
    resources = settings.resources
    callbacks: list[ControllerCallback] = [IntroduceController(board)]
    if settings.elastic:
        callbacks.append(SaveBeforeResize(board, resources.resize_save_s))
    _set_ray_train_environment(settings)
    least = settings.min_workers
    env = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    if settings.deterministic:
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"settings": settings.model_dump(mode="json"), "board": board, "check_only": check_only},
        # Later than the watchdog, which says where a worker stands: a first step may keep the others waiting.
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(max(60, 2 * FIRST_BEAT * resources.hang_timeout_s))),
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=use_gpu,
            resources_per_worker=placement.per_worker(settings, use_gpu),
            elastic_resize_monitor_interval_s=resources.resize_check_s,
        ),
        run_config=ray.train.RunConfig(
            # A fresh name each time: Ray has no say in what a run goes on from.
            name=uuid.uuid4().hex[:12],
            storage_path=folder,
            failure_config=ray.train.FailureConfig(
                max_failures=0 if check_only else resources.max_failures,
                max_preemption_failures=resources.max_preemptions,
                controller_failure_limit=resources.start_attempts,
            ),
            callbacks=callbacks,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": env} if env else None,
        ),
    )


def _set_ray_train_environment(settings: TrainSettings) -> None:
    """Ray Train reads these from the driver's environment and hands them to its controller and workers."""
    resources = settings.resources
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(resources.hang_timeout_s)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    # ray.train.report waits for the controller's next look: 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")


def _error(kind: str, message: str) -> ScenerayError:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, ScenerayError):
        return found(message)
    return TrainingError(message)


def _explain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return f"the workers ended for good: {last} The run folder's logs/ and --debug say more; the same command goes on."
