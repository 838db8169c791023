"""What a sweep leaves to be read: records, the table, sweep.json and best.yaml."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sceneray import config, storage
from sceneray.config import TrainSettings
from sceneray.errors import StorageError
from tests.stores import tiny_settings, town_store
from tune import report
from tune.report import Record
from tune.settings import TuneSettings


def sweep_settings(sweep: str, *overrides: str) -> TuneSettings:
    """Settings of a sweep over two things."""
    space = "space={optimizer.lr: {loguniform: [0.001, 0.1]}, model.backbone: {choice: [resnet18, resnet34]}}"
    return config.load(TuneSettings, None, [f"sweep={sweep}", "train.data.store=/stores/town", space, *overrides])


def record(name: str, *scores: float, state: str = report.FINISHED, **values: Any) -> Record:
    """A trial that was evaluated after each epoch."""
    history = [{"epoch": float(n), "step": 3.0 * n, "miou": score} for n, score in enumerate(scores, start=1)]
    return Record(name, values, state, None, history)


def test_the_best_evaluation_is_the_earliest_highest() -> None:
    """A record's best is its highest finite score, the earliest of equals; without scores there is none."""
    assert record("0", 0.1, 0.5, 0.5, 0.2).best("miou") == {"epoch": 2.0, "step": 6.0, "miou": 0.5}
    assert record("0", 0.1, math.nan).best("miou") == {"epoch": 1.0, "step": 3.0, "miou": 0.1}
    assert record("0").best("miou") is None
    assert record("0", 0.1).best("pixel_accuracy") is None


def test_trials_are_ranked_by_their_best_score() -> None:
    """The highest score comes first and trials without one last, whatever order they ran in."""
    records = [record("0", 0.2), record("1"), record("2", 0.4, 0.1), record("3", 0.3)]
    assert [one.id for one in report.ranked(records, "miou")] == ["2", "3", "0", "1"]


def test_the_table_shows_values_scores_and_reasons() -> None:
    """Columns are aligned, numbers short, and below the table stands why a trial failed."""
    failed = Record("0001", {"optimizer.lr": 0.5, "loss.name": "dice"}, report.FAILED, "the loss is nan at step 3")
    text = report.table([failed, record("0000", 0.25, 0.5, **{"optimizer.lr": 0.0123456, "loss.name": "x"})], "miou")
    assert text.splitlines() == [
        "trial  optimizer.lr  loss.name  miou    epochs  state",
        "0000   0.01235       x          0.5000  2       finished",
        "0001   0.5           dice       -       0       failed",
        "",
        "trial 0001 failed: the loss is nan at step 3",
    ]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Records survive a round trip; one of another version is refused, and none is None."""
    sweep = str(tmp_path)
    written = record("0002", 0.5, **{"model.bins": [1, 2]})
    report.save_record(sweep, written)
    assert report.load_record(sweep, "0002") == written
    assert report.load_record(sweep, "0003") is None
    storage.write_json(storage.join(sweep, "trials", "0004.json"), {"version": 99})
    with pytest.raises(StorageError, match="no trial record of version 1"):
        report.load_record(sweep, "0004")


def test_the_history_is_what_the_run_folder_says(tmp_path: Path) -> None:
    """A trial's scores are read from the metrics that training wrote, so nothing is lost with Ray's own record."""
    from sceneray.training import Runtime, fit

    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    town_store(store, train=4, val=2)
    result = fit(tiny_settings(store, run, "log.contact_sheet=0"), Runtime())
    history = report.val_history(run)
    assert [row["epoch"] for row in history] == [1.0, 2.0]
    assert max(row["miou"] for row in history) == result["miou"]
    assert all(isinstance(value, int | float) for row in history for value in row.values())
    assert report.val_history(str(tmp_path / "no_run")) == []


def test_the_document_names_the_best_trial() -> None:
    """sweep.json lists all trials, best first, and names the best; without a score there is none."""
    settings = sweep_settings("/sweeps/one")
    result = report.document([record("0000", 0.2), record("0001", 0.3)], settings)
    assert (result["best"], result["best_yaml"]) == ("0001", "/sweeps/one/best.yaml")
    assert [trial["run"] for trial in result["trials"]] == ["/sweeps/one/trials/0001", "/sweeps/one/trials/0000"]
    assert result["trials"][0]["best"]["miou"] == 0.3
    assert report.document([Record("0000", {})], settings)["best"] is None


def test_best_yaml_is_a_settings_file_for_train(tmp_path: Path) -> None:
    """best.yaml loads as training settings with the best values and a run of its own, and opens with a comment."""
    settings = sweep_settings("/sweeps/one", "train.epochs=7", "gpus_per_trial=1")
    best = record("0003", 0.1, 0.6, **{"optimizer.lr": 0.02, "model.backbone": "resnet34"})
    path = tmp_path / "best.yaml"
    path.write_text(report.best_yaml(best, settings))
    train = config.load(TrainSettings, str(path))
    assert (train.optimizer.lr, train.model.backbone, train.epochs) == (0.02, "resnet34", 7)
    assert (train.run, train.workers) == ("/sweeps/one/best", 1)
    assert train.resources.gpu is None, "what a trial was given is not what the next run must have"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "trial 0003 of /sweeps/one" in comment[0]
    assert "optimizer.lr=0.02, model.backbone=resnet34" in comment[1]
    assert "0.6000 at epoch 2" in comment[2]
    assert comment[3] == "# Command: sceneray train /sweeps/one/best.yaml"
    assert yaml.safe_load(path.read_text())["data"]["store"] == "/stores/town"
