"""Training under Ray Train: real workers that are killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sceneray import checkpoint, config, runlog, storage
from sceneray.data.store import Store
from sceneray.errors import ConfigError, TrainingError
from tests.commands import Command, command_line, descendants, same_bits
from tests.stores import tiny_settings


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """One private Ray for the tests that need no process of their own."""
    from jobs.ray_session import ray_session

    with ray_session(cpus=2):
        yield


def settings_of(store: str, run: str, *overrides: str) -> config.TrainSettings:
    """A run of two workers, saved every other step."""
    return tiny_settings(store, run, "workers=2", "save={every_steps: 2}", "resources.gpu=false", *overrides)


def test_killed_and_interrupted_runs_end_with_the_clean_runs_bits(store: str, tmp_path: Path, here: None) -> None:
    """kill -9 on a worker in mid-epoch, then Ctrl-C, then the same command again: every time it goes on from the last
    committed checkpoint, and the final weights are those of a run that nobody touched."""
    from jobs.train import train

    length = ("epochs=4", "eval_every=4", "log.contact_sheet=0")
    clean, rough = str(tmp_path / "clean"), str(tmp_path / "rough")
    assert train(settings_of(store, clean, *length))["attempts"] == 1

    command = Command(settings_of(store, rough, *length), tmp_path)
    # Freeze the run at a committed checkpoint, so that the kill falls into the epoch however fast the machine is.
    command.until(lambda: len(checkpoint.names(rough)) >= 1 and storage.is_file(f"{rough}/last"))
    os.kill(command.workers()[0], signal.SIGKILL)
    command.until(lambda: len(runlog.attempts(rough)) == 2)
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait() == 75, command.text()
    assert "The same command goes on from there" in command.text()
    assert "Traceback" not in command.text()
    stopped_at = checkpoint.load(f"{rough}/last").step

    again = Command(settings_of(store, rough, *length), tmp_path)
    assert again.wait() == 0, again.text()
    result = json.loads(again.result.read_text())
    assert result["state"] == "finished"
    records = runlog.attempts(rough)
    assert [record["attempt"] for record in records] == [1, 2, 3]
    assert 0 < records[1]["from_step"] <= records[2]["from_step"] == stopped_at < result["steps"]
    assert same_bits(clean, rough)


@pytest.mark.chaos
@pytest.mark.slice
def test_sigterm_saves_and_a_second_signal_leaves_at_once(store: str, tmp_path: Path) -> None:
    """SIGTERM saves the step at hand and exits with 75; asked twice, the command ends without waiting for a save, and
    what was committed before is whole. Nothing lives on either time."""
    run = str(tmp_path / "run")
    settings = settings_of(
        store, run, "epochs=200", "eval_every=200", "save.every_steps=1000", "augment.crop=[96, 128]"
    )
    polite = Command(settings, tmp_path)
    polite.until(lambda: "step" in polite.text())
    polite.process.send_signal(signal.SIGTERM)
    started = descendants(polite.process.pid)
    assert polite.wait() == 75, polite.text()
    saved = checkpoint.load(f"{run}/last").step
    assert f"stopped at step {saved} of 1200; saved." in polite.text()
    hasty = Command(settings, tmp_path)
    hasty.until(lambda: "step" in hasty.text().partition("going on")[2])
    started += descendants(hasty.process.pid)
    hasty.process.send_signal(signal.SIGINT)
    hasty.until(lambda: "Ctrl-C again" in hasty.text())
    hasty.process.send_signal(signal.SIGINT)
    assert hasty.wait() in (75, 130), "75 where it was faster than the second signal"
    assert checkpoint.load(f"{run}/last").step >= saved
    assert not [pid for pid in started if command_line(pid)], "nothing lives on"


def test_the_same_command_again_finds_a_finished_run(store: str, tmp_path: Path, here: None) -> None:
    """A finished run is left alone; with other settings it is refused with each difference; free ones may change."""
    from jobs.train import train

    run = str(tmp_path / "run")
    first = train(settings_of(store, run, "epochs=0.5"))
    assert train(settings_of(store, run, "epochs=0.5", "save.keep=9")) == first
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.01 → 0.5; seed: 0 → 3"):
        train(settings_of(store, run, "epochs=0.5", "optimizer.lr=0.5", "seed=3"))


def test_a_dry_run_places_workers_and_writes_nothing(
    store: str, tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dry-run takes a step on both workers, says what it found, and leaves no checkpoint."""
    from jobs.train import train

    run = tmp_path / "run"
    found = train(settings_of(store, str(run)), check_only=True)
    assert found["steps"] == 12
    assert "24 train and 5 val images; 2 workers on cpu" in capsys.readouterr().out
    assert not (run / "checkpoints").exists()
    assert not (run / "config.yaml").exists()


def test_a_loss_that_is_not_finite_ends_the_run(store: str, tmp_path: Path, here: None) -> None:
    """NaN is not tried again: one error with step and samples, and no checkpoint after it."""
    from jobs.train import train

    run = str(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+, samples train-"):
        train(settings_of(store, run, "optimizer.lr=1e18", "save.every_steps=100"))
    assert len(runlog.attempts(run)) == 1
    assert checkpoint.newest(run, print) is None
    from sceneray.ray_train.driver import THREAD  # after Ray's environment is set

    names = [thread.name for thread in threading.enumerate()]
    assert THREAD not in names, "no thread is left waiting inside Ray, which the process is about to leave"


def test_more_workers_than_the_machine_has_is_refused(store: str, tmp_path: Path, here: None) -> None:
    """A request that can never be placed on this machine ends at once with what was asked and what there is."""
    from jobs.train import train

    with pytest.raises(ConfigError, match=r"3 workers need 3 CPU; the cluster has 2 CPU on 1 node\(s\), room for 2\."):
        train(settings_of(store, str(tmp_path / "run"), "workers=3"))


def test_evaluate_agrees_with_the_run_for_any_number_of_workers(store: str, tmp_path: Path, here: None) -> None:
    """The verb scores the best checkpoint as training did, with one worker as with two, every image once."""
    from jobs.evaluate import evaluate
    from jobs.train import train

    run = str(tmp_path / "run")
    result = train(settings_of(store, run, "epochs=1"))
    one, two = (evaluate(f"{run}/best", None, "val", workers) for workers in (1, 2))
    assert one == two
    assert one["images"] == Store.open(store).rows("val")
    assert one["miou"] == pytest.approx(result["miou"], abs=1e-9)
