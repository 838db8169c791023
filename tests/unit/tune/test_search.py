"""A sweep before and around Ray: its settings, its trials, what it continues, and how trials end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sceneray import config, storage
from sceneray.errors import ConfigError, DataError, Interrupted, ScenerayError
from tests.support import ROOT
from tune import report, schedulers, search
from tune.report import Record
from tune.settings import TuneSettings, plan, with_full_paths


def sweep_settings(*overrides: str) -> TuneSettings:
    """Settings of a small sweep; later overrides win."""
    base = ("sweep=/sweeps/one", "train.data.store=/stores/town", "space={optimizer.lr: {loguniform: [0.001, 0.1]}}")
    return config.load(TuneSettings, None, [*base, *overrides])


def test_trials_share_settings_and_differ_in_what_is_searched() -> None:
    """Every trial has the shared settings, its drawn values, a run folder of its own and one worker."""
    settings = sweep_settings("train.epochs=3", "train.workers=4", "trials=3", "cpus_per_trial=2")
    trials = plan(settings)
    assert [trial.id for trial in trials] == ["0000", "0001", "0002"]
    assert [trial.settings.run for trial in trials] == [f"/sweeps/one/trials/{trial.id}" for trial in trials]
    assert len({trial.settings.optimizer.lr for trial in trials}) == 3
    for trial in trials:
        assert trial.values == {"optimizer.lr": trial.settings.optimizer.lr}
        assert (trial.settings.epochs, trial.settings.workers, trial.settings.threads) == (3, 1, 2)


def test_a_trial_uses_what_is_reserved_for_it() -> None:
    """A trial trains on a GPU exactly where the sweep reserves one for it."""
    assert plan(sweep_settings())[0].settings.resources.gpu is False
    assert plan(sweep_settings("gpus_per_trial=1"))[0].settings.resources.gpu is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space={optimizer.lrr: {uniform: [0, 1]}}"], "unknown key 'optimizer.lrr': did you mean 'optimizer.lr'?"),
        (["space={optimiser.lr: {uniform: [0, 1]}}"], "did you mean 'optimizer'?"),
        (["space={optimizer.lr: {uniform: [-1, -0.5]}}"], "greater than 0"),
        (["space={loss.name: {choice: [cross_entrpy]}}"], "did you mean 'cross_entropy'"),
        (["space={batch_size: {choice: [1]}}", "train.accumulate=2"], "batch_size"),
        (["space={workers: {choice: [2]}}"], "one worker"),
        (["space={run: {choice: [a]}}"], "own run folder"),
    ],
)
def test_a_space_that_training_would_refuse_is_refused_before_ray_starts(overrides: list[str], message: str) -> None:
    """An unknown setting, or a drawn value outside its range, is a ConfigError of the plan."""
    with pytest.raises(ConfigError, match=message):
        plan(sweep_settings(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer.lrr=1", "did you mean 'train.optimizer.lr'?"),
        ("train.run=/runs/x", "every trial gets its own run folder"),
        ("scheduler.name=ashaa", "did you mean 'asha'"),
        ("scheduler.reduction_factor=1", "greater than 1"),
        ("space={optimizer.lr: {unifrom: [0, 1]}}", "did you mean 'uniform'"),
        ("metric=loss", "metric"),
        ("trails=3", "did you mean 'trials'?"),
    ],
)
def test_wrong_sweep_settings_are_named(override: str, message: str) -> None:
    """Unknown names in a sweep's settings are refused with the nearest known one."""
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        sweep_settings(override)


def test_paths_are_made_absolute_for_processes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of the sweep and of training are resolved; URLs stay."""
    monkeypatch.chdir(tmp_path)
    settings = with_full_paths(sweep_settings("sweep=s", "train.data.store=stores/a", "train.init_from=s3://b/r/best"))
    assert settings.sweep == str(tmp_path / "s")
    assert settings.train.data.store == str(tmp_path / "stores/a")
    assert settings.train.init_from == "s3://b/r/best"
    assert settings.train.run == ""


def test_the_same_sweep_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    """Opened again, records are as they were left, more trials are welcome, and changed settings are listed."""
    settings = sweep_settings(f"sweep={tmp_path}/s", "trials=2")
    records = search.open_sweep(settings, plan(settings))
    assert [one.state for one in records.values()] == [report.WAITING, report.WAITING]
    done = Record("0001", records["0001"].values, report.STOPPED, None, [{"epoch": 1.0, "miou": 0.5}])
    report.save_record(settings.sweep, done)
    grown = settings.model_copy(update={"trials": 4, "max_concurrent": 1})
    again = search.open_sweep(grown, plan(grown))
    assert again["0001"] == done
    assert [one.state for one in again.values()].count(report.WAITING) == 3
    changed = sweep_settings(f"sweep={tmp_path}/s", "train.epochs=9")
    with pytest.raises(ConfigError, match=r"train\.epochs: 50.* → 9"):
        search.open_sweep(changed, plan(changed))


def test_nothing_starts_without_data(tmp_path: Path) -> None:
    """A sweep over a store that is not there ends with a DataError, before Ray and without a sweep folder."""
    path = tmp_path / "sweep.yaml"
    path.write_text(config.dump(sweep_settings(f"sweep={tmp_path}/s", f"train.data.store={tmp_path}/nothing")))
    arguments = argparse.Namespace(config=str(path), overrides=[], address=None)
    with pytest.raises(DataError, match="no dataset store"):
        search.run(arguments)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("failure", "result", "expected"),
    [
        ("the loss is nan", False, report.FAILED),
        (None, True, report.FINISHED),
        (None, False, report.STOPPED),
    ],
)
def test_how_a_trial_ended_is_written_down(tmp_path: Path, failure: str | None, result: bool, expected: str) -> None:
    """A trial failed, finished or was stopped early; its record says which."""
    settings = sweep_settings(f"sweep={tmp_path}", "trials=1")
    if result:
        storage.write_json(f"{tmp_path}/trials/0000/result.json", {})
    follower = search.Follower(settings, {"0000": Record("0000", {"optimizer.lr": 0.1}, report.RUNNING)})
    follower.end("0000", failure)
    written = report.load_record(settings.sweep, "0000")
    assert written is not None
    assert (written.state, written.reason) == (expected, failure)


@pytest.mark.parametrize(
    ("seconds", "states", "complete", "expected"),
    [
        (100, [report.RUNNING, report.WAITING], True, [report.OUT_OF_TIME, report.WAITING]),
        (0, [report.RUNNING, report.FINISHED], False, [report.INTERRUPTED, report.FINISHED]),
        (0, [report.FINISHED, report.WAITING], False, [report.FINISHED, report.WAITING]),
        (0, [report.FINISHED, report.STOPPED], True, [report.FINISHED, report.STOPPED]),
    ],
)
def test_what_still_ran_at_the_end_was_cut_off(
    tmp_path: Path, seconds: float, states: list[str], complete: bool, expected: list[str]
) -> None:
    """Trials cut off by the clock end the sweep in order; those cut off by Ctrl-C make it interrupted."""
    settings = sweep_settings(f"sweep={tmp_path}", "time_budget_s=60")
    records = {str(n): Record(str(n), {}, state) for n, state in enumerate(states)}
    follower = search.Follower(settings, records)
    follower.started_at -= seconds
    assert follower.close() is complete
    assert [record.state for record in records.values()] == expected


def test_an_interrupted_sweep_shows_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-C the table and best.yaml are those of the trials so far, and the verb says how to go on."""
    settings = sweep_settings(f"sweep={tmp_path}", "trials=2")
    half = Record("0000", {"optimizer.lr": 0.1}, report.INTERRUPTED, None, [{"epoch": 1.0, "miou": 0.5}])
    with pytest.raises(Interrupted, match="The same command goes on"):
        search.finish(settings, [half, Record("0001", {"optimizer.lr": 0.2})], interrupted=True)
    assert "interrupted" in capsys.readouterr().out
    assert storage.is_file(f"{tmp_path}/best.yaml")


def test_a_sweep_without_any_score_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all trials failed the table says why, sweep.json is there, best.yaml is not, and the verb fails."""
    settings = sweep_settings(f"sweep={tmp_path}")
    failed = Record("0000", {"optimizer.lr": 9.0}, report.FAILED, "the loss is nan at step 3")
    with pytest.raises(ScenerayError, match="no trial has a miou"):
        search.finish(settings, [failed])
    assert "trial 0000 failed: the loss is nan at step 3" in capsys.readouterr().out
    assert storage.is_file(f"{tmp_path}/sweep.json")
    assert not storage.exists(f"{tmp_path}/best.yaml")


def decisions(scheduler: Any, scores: dict[str, list[float]]) -> dict[str, int]:
    """After how many epochs the scheduler stops each trial, in turn; 0 where it runs to its end."""
    from types import SimpleNamespace

    stopped = {}
    for name, row in scores.items():
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        answers = [
            scheduler.on_trial_result(None, trial, {"epoch": float(epoch), "miou": score, "training_iteration": 1})
            for epoch, score in enumerate(row, start=1)
        ]
        stopped[name] = answers.index("STOP") + 1 if "STOP" in answers else 0
    return stopped


def test_asha_stops_by_epochs_and_not_at_the_end() -> None:
    """A poor trial is stopped at the first rung it loses; the best one is never stopped, not even at its last epoch."""
    settings = sweep_settings("train.epochs=4", "scheduler.reduction_factor=2", "trials=3")
    scores = {"good": [0.5, 0.6, 0.7, 0.8], "poor": [0.1, 0.2, 0.3, 0.4], "late": [0.6, 0.3, 0.3, 0.3]}
    assert decisions(schedulers.scheduler_of(settings, plan(settings), []), scores) == {"good": 0, "poor": 1, "late": 2}


def test_kept_trials_still_set_the_bar() -> None:
    """When a sweep goes on, a new trial is measured against those that an earlier call ran."""
    settings = sweep_settings("train.epochs=4", "scheduler.reduction_factor=2", "trials=3")
    kept = Record("0000", {}, report.FINISHED, None, [{"epoch": float(n), "miou": 0.5 + n / 10} for n in range(1, 5)])
    poor = {"poor": [0.1, 0.2, 0.3, 0.4]}
    assert decisions(schedulers.scheduler_of(settings, plan(settings), []), poor) == {"poor": 0}
    assert decisions(schedulers.scheduler_of(settings, plan(settings), [kept]), poor) == {"poor": 1}


@pytest.mark.parametrize("override", ["scheduler.name=none", "scheduler.grace_period=9"])
def test_trials_may_all_run_to_their_end(override: str) -> None:
    """Without a scheduler, or with a grace period of the whole run, nothing is stopped early."""
    settings = sweep_settings("train.epochs=4", override)
    scores = {"good": [0.5, 0.6, 0.7, 0.8], "poor": [0.1, 0.2, 0.3, 0.4]}
    assert decisions(schedulers.scheduler_of(settings, plan(settings), []), scores) == {"good": 0, "poor": 0}


def test_every_shipped_sweep_is_sound() -> None:
    """The settings files in tune/configs load, their spaces make valid trials, and they open with a comment."""
    paths = sorted((ROOT / "tune" / "configs").glob("*.yaml"))
    assert [path.name for path in paths] == ["town.yaml"]
    for path in paths:
        assert plan(config.load(TuneSettings, str(path)))
        assert path.read_text().startswith("# ")
