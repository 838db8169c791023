"""Metrics in a real MLflow store: one MLflow run a run folder, and a server in trouble that stops nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sceneray import mlflow_log, runlog
from sceneray.config import TrainSettings
from sceneray.mlflow_log import MlflowLog
from tests.stores import tiny_settings
from tests.support import ROOT, free_port

TRAIN = {"step": 10, "epoch": 1.0, "loss": 0.5, "lr": 0.01, "images_per_second": 40.0}
VAL = {"step": 20, "epoch": 2.0, "miou": 0.25, "iou": [0.25]}


@pytest.fixture(autouse=True)
def _mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one store that works without a server and a database library; and the switch that the module itself sets."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The tracking URI of an empty MLflow store."""
    return (tmp_path / "mlflow").as_uri()


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run folder."""
    return str(tmp_path / "runs" / "it's a town")


def settings(run: str, *overrides: str) -> TrainSettings:
    """Settings of two epochs."""
    return tiny_settings("stores/none", run, *overrides)


def runs_in(store: str) -> list[object]:
    """All MLflow runs of the experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("sceneray")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def history(store: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    from mlflow.tracking import MlflowClient

    return [(row.step, row.value) for row in MlflowClient(tracking_uri=store).get_metric_history(run_id, key)]


def test_mlflow_has_the_rows_and_the_settings(store: str, run: str) -> None:
    """Every number of a row is a metric at its step, every setting a parameter; a run to its end is FINISHED."""
    with_sink = settings(run, f"log.mlflow={store}")
    log = runlog.MetricsLog(run, 1, tensorboard=False, sinks=mlflow_log.sinks_of(with_sink, 1))
    log.add("train", TRAIN)
    log.flush()
    log.add("val", VAL)
    log.close()
    (found,) = runs_in(store)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "it's a town"
    assert found.data.tags["sceneray.run"] == run
    assert found.data.metrics == {
        "train/loss": 0.5, "train/lr": 0.01, "train/images_per_second": 40.0, "val/miou": 0.25,
    }  # fmt: skip
    assert history(store, found.info.run_id, "val/miou") == [(20, 0.25)]
    assert found.data.params["optimizer.lr"] == "0.01"
    assert found.data.params["augment.crop"] == "[32, 40]"
    assert "log.mlflow" not in found.data.params
    runlog.claim_attempt(run, {"from_step": 0})
    assert [row["step"] for row in runlog.read_metrics(run)] == [10, 20]  # the run folder has them in any case


def test_a_later_attempt_goes_on_with_the_same_mlflow_run(store: str, run: str) -> None:
    """A resumed run folder finds its MLflow run by its tag; another folder gets another one."""
    first = MlflowLog(store, run, settings(run), 1)
    first.add("train", TRAIN)
    first.close()
    (found,) = runs_in(store)
    assert found.info.status == "KILLED"  # one epoch of two
    second = MlflowLog(store, run, settings(run, "workers=2"), 2)
    second.add("train", {**TRAIN, "step": 15, "epoch": 2.0, "loss": 0.4})
    second.close()
    (again,) = runs_in(store)
    assert again.info.run_id == found.info.run_id
    assert again.info.status == "FINISHED"
    assert history(store, again.info.run_id, "train/loss") == [(10, 0.5), (15, 0.4)]
    assert (again.data.tags["sceneray.attempt"], again.data.params["workers"]) == ("2", "1")
    MlflowLog(store, f"{run}-2", settings(f"{run}-2"), 1).close()
    assert len(runs_in(store)) == 2


def test_many_rows_go_up_in_requests_that_mlflow_takes(store: str, run: str) -> None:
    """More metrics than one request may hold all arrive."""
    sink = MlflowLog(store, run, settings(run), 1)
    for step in range(1, 701):
        sink.add("train", {**TRAIN, "step": step})
    sink.close()
    (found,) = runs_in(store)
    assert len(history(store, found.info.run_id, "train/loss")) == 700


def test_without_mlflow_in_the_settings_there_is_no_sink(run: str) -> None:
    """log.mlflow is off by default."""
    assert mlflow_log.sinks_of(settings(run), 1) == ()


def test_a_store_that_fails_is_warned_of_once(tmp_path: Path, run: str, caplog: pytest.LogCaptureFixture) -> None:
    """Rows go on being taken, nothing is raised, and one warning says what happened."""
    (tmp_path / "file").write_text("no folder")
    sink = MlflowLog((tmp_path / "file" / "below").as_uri(), run, settings(run), 1)
    for step in range(3):
        sink.add("train", {**TRAIN, "step": step})
        sink.flush()
    sink.close()
    assert sink.failed
    sink.add("train", TRAIN)
    sink.flush()
    sink.close()
    assert len(caplog.messages) == 1
    assert "training goes on" in caplog.text


def test_no_password_gets_into_a_log(
    monkeypatch: pytest.MonkeyPatch, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody listens at an address with a password in it, the warning names the host alone."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    sink = MlflowLog(f"http://jane:hunter2@127.0.0.1:{port}", run, settings(run), 1)
    sink.close()
    assert sink.failed
    assert str(port) in caplog.text
    assert "hunter2" not in caplog.text


def test_user_and_password_are_cut_from_any_text() -> None:
    """Whatever a client puts into its error, the part of a URL before the @ is left out."""
    text = "GET https://jane:hunter2@host/api and http://host/a@b failed"
    assert mlflow_log._without_secrets(text) == "GET https://host/api and http://host/a@b failed"


def test_a_silent_server_does_not_hold_the_end(
    monkeypatch: pytest.MonkeyPatch, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that accepts and never answers delays nobody but `close`, and that for a bounded time."""
    monkeypatch.setattr(mlflow_log, "CLOSE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = MlflowLog(f"http://127.0.0.1:{silent.getsockname()[1]}", run, settings(run), 1)
        sink.add("train", TRAIN)
        sink.flush()
        sink.close()
        assert sink._thread.is_alive()
    sink._thread.join(60)  # its server is gone
    assert not sink._thread.is_alive()
    assert len(caplog.messages) == 1
    assert "not taken all metrics in 0.2 s" in caplog.text


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """Where mlflow cannot be imported, ConfigError names the extra; importing the module alone asks for nothing."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('not here')")
    code = (
        "from sceneray.mlflow_log import MlflowLog\n"
        "from sceneray.errors import ConfigError\n"
        "try:\n    MlflowLog('x', 'y', None, 1)\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "platform")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert "pip install 'sceneray[mlflow]'" in done.stdout
