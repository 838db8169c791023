"""`sceneray tune` on a private local Ray: real trials, a real scheduler, and what happens when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sceneray import config, runlog, storage
from sceneray.config import TrainSettings
from sceneray.training import Runtime, fit
from tests.stores import tiny_settings, town_store
from tests.support import ROOT

GO_ON = 75


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 12 train and 4 val scenes."""
    url = str(tmp_path_factory.mktemp("stores") / "town")
    town_store(url, train=12, val=4)
    return url


def write_sweep(folder: Path, store: str, *train: str, **settings: Any) -> Path:
    """A settings file for a sweep of tiny trials; its sweep folder is given relative to `folder`."""
    shared = tiny_settings(store, "unused", "log.contact_sheet=0", *train).model_dump(mode="json")
    del shared["run"]
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"sweep": "sweep", "train": shared, **settings}))
    return path


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`sceneray tune WORDS` in `folder`, its output in files there."""
    code = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "tune.search", *words],
            cwd=folder, env={**os.environ, "PYTHONPATH": code}, stdout=out, stderr=err, text=True,
        )  # fmt: skip


def tune(folder: Path, *words: str) -> tuple[int, str, str]:
    """Run `sceneray tune WORDS` to its end: exit code, stdout, stderr."""
    code = start(folder, *words).wait(300)
    return code, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`; fails where the process ends before."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.1)  # between two polls of the condition
    raise AssertionError("the sweep ended, or nothing happened in 240 s")


def trial_processes(driver: int) -> Iterator[int]:
    """Ids of the processes of trials that the Ray of `driver` runs now."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines() if len(line.split(None, 2)) == 3]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}
    for pid, _, command in rows:
        ancestor = int(pid)
        while ancestor in parents and ancestor != driver:
            ancestor = parents[ancestor]
        if ancestor == driver and command.startswith("ray::ImplicitFunc"):
            yield int(pid)


def test_a_sweep_ends_in_a_table_and_settings_that_train_takes(store: str, tmp_path: Path) -> None:
    """Trials that train are ranked, one that diverges is listed with its reason, and best.yaml trains as it is."""
    space = {"optimizer.lr": {"choice": [0.01, 1e9]}, "model.dropout": {"uniform": [0, 0.3]}}
    path = write_sweep(tmp_path, store, space=space, trials=3, seed=2)
    code, out, err = tune(tmp_path, str(path), "--json", "result.json")
    assert code == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "sweep/sweep.json").read_text())
    states = {trial["id"]: trial["state"] for trial in result["trials"]}
    diverged = [trial["id"] for trial in result["trials"] if trial["values"]["optimizer.lr"] == 1e9]
    assert diverged, "the seed draws both rates"
    assert all((state == "failed") == (name in diverged) for name, state in states.items())
    lines = out.splitlines()
    assert lines[0].split() == ["trial", "model.dropout", "optimizer.lr", "miou", "epochs", "state"]
    assert lines[1].startswith(result["best"])
    assert f"trial {diverged[0]} failed: the loss is nan at step" in out
    best = config.load(TrainSettings, str(tmp_path / "sweep/best.yaml"))
    assert (best.run, best.data.store) == (str(tmp_path / "sweep/best"), store)
    values = result["trials"][0]["values"]
    assert best.optimizer.lr == values["optimizer.lr"]
    assert fit(best, Runtime())["miou"] == pytest.approx(result["trials"][0]["best"]["miou"], abs=1e-9)


def test_a_sweep_outlives_a_killed_trial_and_ctrl_c(store: str, tmp_path: Path) -> None:
    """A trial whose process is killed goes on from its checkpoint, and after Ctrl-C the same command finishes."""
    space = {"optimizer.lr": {"loguniform": [0.001, 0.01]}}
    path = write_sweep(tmp_path, store, "epochs=20", space=space, trials=1, scheduler={"name": "none"})
    run = str(tmp_path / "sweep/trials/0000")
    process = start(tmp_path, str(path))
    try:
        wait_for(process, lambda: storage.is_file(f"{run}/last"))
        os.kill(wait_for(process, lambda: list(trial_processes(process.pid)))[0], signal.SIGKILL)
        wait_for(process, lambda: len(runlog.attempts(run)) == 2)
        assert runlog.attempts(run)[1]["from_step"] >= 3, "an epoch is three steps"
        second = list(trial_processes(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == GO_ON
    finally:
        process.kill()
        process.wait()
    assert "The same command goes on from there." in (tmp_path / "err.txt").read_text()
    assert second
    assert not any(Path(f"/proc/{pid}").exists() for pid in second), "nothing lives on after Ctrl-C"
    code, out, err = tune(tmp_path, str(path))
    assert code == 0, err
    assert out.splitlines()[1].endswith("finished")
    done = storage.read_json(f"{run}/result.json")
    assert done["step"] == 60
    assert done["attempts"] == 3
