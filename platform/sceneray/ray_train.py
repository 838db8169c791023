"""Training on a Ray cluster: Ray Train starts the workers and starts them again; `sceneray.training` does the rest.

The only module of the library that imports ray. Ray's own run folder lies under RUN/.ray and carries metrics alone:
what a run goes on from is decided by the checkpoints in RUN.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch

from sceneray import config, errors, storage
from sceneray.board import Board
from sceneray.config import TrainSettings
from sceneray.data.store import Store
from sceneray.errors import ConfigError, Interrupted, ScenerayError, TrainingError
from sceneray.training import RESULT, Runtime, dry_run, fit

POLL_S = 0.5
log = logging.getLogger("sceneray.ray_train")

Progress = Callable[[dict[str, Any]], None]


def prepare_run(settings: TrainSettings) -> TrainSettings:
    """Check `settings` against what stands in the run folder, write RUN/config.yaml, and return them with full paths.

    Raises ConfigError where the run was started with other settings, with each difference.
    """
    settings = with_full_paths(settings)
    Store.open(settings.data.store)
    url = storage.join(settings.run, "config.yaml")
    try:
        before = config.load(TrainSettings, url) if storage.is_file(url) else None
    except ConfigError as error:
        raise ConfigError(f"{error} The run folder was written by another version: give another run.") from error
    if before is not None:
        changed = config.differences(before, settings, config.RESUMABLE_WITH_OTHER)
        if changed:
            raise ConfigError(
                f"{settings.run} was started with other settings: {'; '.join(changed)}. Use those of {url}, or give "
                f"another run=URL. Free to change are: {', '.join(config.RESUMABLE_WITH_OTHER)}."
            )
    storage.write_bytes(url, config.dump(settings).encode())
    return settings


def with_full_paths(settings: TrainSettings) -> TrainSettings:
    """Relative paths made absolute: workers run in folders of their own."""
    return config.map_files(settings, lambda _, url: storage.absolute(url))


def launch(settings: TrainSettings, on_progress: Progress, check_only: bool = False) -> dict[str, Any]:
    """Train on the Ray that this process is connected to; returns RUN/result.json.

    Ctrl-C asks the workers to save and leave, then raises Interrupted; a second one leaves at once. With `check_only`
    nothing is written: workers are placed and take one step (`sceneray.training.dry_run`).
    """
    if check_only:
        settings = with_full_paths(settings)
        _check_rights(settings.run)
    else:
        settings = prepare_run(settings)
        done = storage.join(settings.run, RESULT)
        if storage.is_file(done):
            log.warning("%s is finished already; nothing to do", settings.run)
            return dict(storage.read_json(done))
    use_gpu = _use_gpu(settings)
    _check_placement(settings, use_gpu)
    board = ray.remote(num_cpus=0)(Board).remote()
    trainer = _trainer(settings, use_gpu, board, check_only)
    outcome = _run(trainer, board, on_progress)
    if outcome.get("state") == "stopped":
        raise Interrupted(
            f"stopped at step {outcome['step']} of {outcome['steps']}; saved. The same command goes on from there."
        )
    return outcome


def worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each training process runs."""
    settings = TrainSettings.model_validate(arguments["settings"])
    board = arguments["board"]
    if ray.get(board.failed.remote()):
        return {"state": "failed"}
    context = ray.train.get_context()
    stop = threading.Event()
    ended = threading.Event()

    def watch() -> None:
        # Beside the loop, so that no step waits for a Ray call.
        while not ended.wait(POLL_S) and not stop.is_set():
            if ray.get(board.stop_requested.remote()):
                stop.set()

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(metrics)

    runtime = Runtime(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        workers_here=context.get_local_world_size(),
        device_index=_device_index(settings),
        report=report,
        progress=lambda row: board.add.remote(row),
        should_stop=stop.is_set,
    )
    if runtime.rank == 0:
        threading.Thread(target=watch, daemon=True, name="stop-watch").start()
    try:
        return dry_run(settings, runtime) if arguments["check_only"] else fit(settings, runtime)
    except ScenerayError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise
    finally:
        ended.set()


def _run(trainer: ray.train.torch.TorchTrainer, board: Any, on_progress: Progress) -> dict[str, Any]:
    """Ray Train in a thread beside this one, which shows progress and turns Ctrl-C into a wish to stop."""
    outcome: dict[str, Any] = {}
    # An event, not join(): in Python 3.11 a Ctrl-C inside join(timeout) marks a running thread as ended.
    ended = threading.Event()

    def work() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except Exception as error:  # noqa: BLE001  handed to the main thread, which raises it
            outcome["error"] = error
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True, name="ray-train").start()
    stopping = False
    last_look = False
    while not last_look:
        try:
            last_look = ended.wait(POLL_S)
            rows, failure = ray.get(board.take.remote())
            for row in rows:
                on_progress(row)
            if failure is not None:
                raise _error(*failure)
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping, last_look = True, False
            on_progress({"kind": "stopping"})
            board.request_stop.remote()
    if "error" in outcome:
        raise TrainingError(_explain(outcome["error"])) from outcome["error"]
    return dict(outcome["value"])


def _trainer(settings: TrainSettings, use_gpu: bool, board: Any, check_only: bool) -> ray.train.torch.TorchTrainer:
    resources = settings.resources
    # Ray Train reads these from the driver's environment and hands them to its controller and workers.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s)
    filesystem, path = storage.filesystem(storage.join(settings.run, ".ray"))
    per_worker = {"CPU": resources.cpus} | ({"GPU": 1.0} if use_gpu else {})
    return ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"settings": settings.model_dump(mode="json"), "board": board, "check_only": check_only},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            # A fresh name each time: Ray has no say in what a run goes on from.
            name=uuid.uuid4().hex[:12],
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
            failure_config=ray.train.FailureConfig(
                max_failures=0 if check_only else resources.max_failures,
                controller_failure_limit=resources.start_attempts,
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(settings.threads)}} if settings.threads else None,
        ),
    )


def _use_gpu(settings: TrainSettings) -> bool:
    if settings.resources.gpu is not None:
        return settings.resources.gpu
    return bool(ray.cluster_resources().get("GPU", 0) >= settings.workers)


def _device_index(settings: TrainSettings) -> int:
    if settings.resources.gpu is False:
        return 0
    index = ray.train.torch.get_device().index
    return int(index or 0)


def _check_placement(settings: TrainSettings, use_gpu: bool) -> None:
    """Refuse what a cluster without room to grow can never place."""
    have = ray.cluster_resources()
    needed = {"CPU": settings.workers * settings.resources.cpus, "GPU": float(settings.workers * use_gpu)}
    short = [
        f"{need:g} {kind} (it has {have.get(kind, 0):g})" for kind, need in needed.items() if need > have.get(kind, 0)
    ]
    if short and len(ray.nodes()) == 1 and not _autoscales():
        raise ConfigError(
            f"{settings.workers} workers need {' and '.join(short)} on this machine. Lower workers or resources.cpus, "
            "or connect to a cluster with --address."
        )


def _autoscales() -> bool:
    """True where an autoscaler may add nodes (a cluster that `ray up` made sets this on its head)."""
    return bool(
        os.environ.get("RAY_CLOUD_INSTANCE_ID") or os.path.exists(os.path.expanduser("~/ray_bootstrap_config.yaml"))
    )


def _check_rights(run: str) -> None:
    """Write and remove a small file in the run folder. Raises StorageError where that is refused."""
    probe = storage.join(run, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"sceneray")
        storage.remove(probe)
    except OSError as error:
        raise errors.StorageError(f"cannot write to {run}: {error}. Check its rights and your credentials.") from error


def _error(kind: str, message: str) -> ScenerayError:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, ScenerayError):
        return found(message)
    return TrainingError(message)


def _explain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return f"the workers ended for good: {last} The run folder's logs/ and --debug say more; the same command goes on."
