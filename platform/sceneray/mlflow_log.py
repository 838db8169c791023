"""Metrics to an MLflow server, besides the run folder: one MLflow run for each run folder, whatever its attempts.

The server is a guest here. It is talked to from a thread of its own, and where it fails, training goes on: one warning
is logged and nothing more is sent. The run folder has every row in any case.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sceneray import storage
from sceneray.config import TrainSettings
from sceneray.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    from sceneray.runlog import Sink

EXPERIMENT = "sceneray"  # where MLFLOW_EXPERIMENT_NAME names no other
RUN_TAG = "sceneray.run"  # the URL of the run folder: by it a later attempt finds its MLflow run again
ATTEMPT_TAG = "sceneray.attempt"
CLOSE_S = 10.0  # the most an ending attempt waits for the server
# Limits of one request, of MLflow's REST API: https://mlflow.org/docs/latest/rest-api.html#log-batch
_METRICS, _PARAMS, _PARAM_LENGTH = 1000, 100, 6000
log = logging.getLogger("sceneray.mlflow_log")


class MlflowLog:
    """A sink of `runlog.MetricsLog`. `flush` and `add` return at once; `close` waits for the server, CLOSE_S at most.

    Credentials come from MLflow's own environment variables. Raises ConfigError where MLflow is not installed.
    """

    def __init__(self, tracking_uri: str, run: str, settings: TrainSettings, attempt: int) -> None:
        # Read by mlflow when it is imported; nobody who trains here has agreed to tell its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.entities import Metric
        except ImportError as error:
            raise ConfigError(
                "log.mlflow needs MLflow, which is not installed: pip install 'sceneray[mlflow]' on every node, or "
                "leave log.mlflow empty."
            ) from error
        self.tracking_uri = tracking_uri
        self.run = run
        self.settings = settings
        self.attempt = attempt
        self.failed = False
        self._metric = Metric
        self._waiting: list[Metric] = []
        self._epoch = 0.0
        self._batches: queue.SimpleQueue[list[Metric] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Keep every number of a metrics row for the next flush, as the metric `kind/name`."""
        if self.failed:
            return
        now_ms = int(time.time() * 1000)
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._waiting.append(self._metric(f"{kind}/{name}", float(value), now_ms, row["step"]))
        self._epoch = row.get("epoch", self._epoch)

    def flush(self) -> None:
        """Hand what was kept to the thread that sends it."""
        # By count: another thread may add meanwhile.
        count = len(self._waiting)
        batch = self._waiting[:count]
        del self._waiting[:count]
        if batch and not self.failed:
            self._batches.put(batch)

    def close(self) -> None:
        """Send the rest and mark the MLflow run as ended; what is not sent in CLOSE_S is given up."""
        self.flush()
        self._batches.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"it has not taken all metrics in {CLOSE_S:g} s")

    def _work(self) -> None:
        try:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=self.tracking_uri)
            run_id = self._open(client)
            while (batch := self._batches.get()) is not None:
                for start in range(0, len(batch), _METRICS):
                    client.log_batch(run_id, metrics=batch[start : start + _METRICS], synchronous=True)
            done = self._epoch >= self.settings.epochs - 1e-3  # a fraction of an epoch is rounded to whole samples
            client.set_terminated(run_id, "FINISHED" if done else "KILLED")
        except Exception as error:  # noqa: BLE001  whatever a server or its client raises: training goes on without
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        """Send nothing more, and say so once."""
        if not self.failed:
            self.failed = True
            text = "MLflow fails and gets no more metrics; training goes on, and the run folder has them all: %s"
            log.warning(text, _without_secrets(why))

    def _open(self, client: MlflowClient) -> str:
        """The id of this run folder's MLflow run, made where there is none; it has the settings as parameters."""
        from mlflow.entities import Param

        experiment = _experiment(client)
        mark = '"' if "'" in self.run else "'"
        found = client.search_runs(
            [experiment], f"tags.`{RUN_TAG}` = {mark}{self.run}{mark}", order_by=["attributes.start_time ASC"]
        )
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment, tags={RUN_TAG: self.run}, run_name=storage.basename(self.run))
        run_id: str = run.info.run_id
        client.set_tag(run_id, ATTEMPT_TAG, str(self.attempt))
        # A parameter can be set once; what a later attempt changed (`workers`, ...) changes nothing that is learned.
        wanted = {key: value for key, value in parameters(self.settings).items() if key not in run.data.params}
        params = [Param(key, value) for key, value in wanted.items()]
        for start in range(0, len(params), _PARAMS):
            client.log_batch(run_id, params=params[start : start + _PARAMS], synchronous=True)
        return run_id


def sinks_of(settings: TrainSettings, attempt: int) -> Sequence[Sink]:
    """The sinks that `settings` ask for, besides TensorBoard: an MLflow server or none."""
    if settings.log.mlflow is None:
        return ()
    return (MlflowLog(settings.log.mlflow, settings.run, settings, attempt),)


def parameters(settings: TrainSettings) -> dict[str, str]:
    """Settings as MLflow parameters: `optimizer.lr` → "0.01". The server's own address is left out."""
    flat: dict[str, str] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = str(value)[:_PARAM_LENGTH]

    walk(settings.model_dump(mode="json"), "")
    del flat["log.mlflow"]  # it may hold a password
    return flat


def _experiment(client: MlflowClient) -> str:
    """The id of the experiment that the environment names, else of `sceneray`."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    experiment: str = client.create_experiment(name) if found is None else found.experiment_id
    return experiment


def _without_secrets(text: str) -> str:
    """`text` without the user:password@ of any URL in it."""
    return re.sub(r"://[^/\s@]+@", "://", text)
