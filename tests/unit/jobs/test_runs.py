"""`sceneray runs`: what a folder of runs tells, and that one damaged run hides no other."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import tables
from jobs.cli import main_of
from jobs.runs import is_run, runs
from sceneray import config, runlog, status, storage
from sceneray.errors import ConfigError
from sceneray.status import Status
from tests.stores import tiny_settings, town_store


def ago(seconds: float) -> str:
    """A time before now, as a status has it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def attempt(number: int, updated_s: float = 10, **others: Any) -> Status:
    """The status of one attempt that was written `updated_s` ago."""
    plain = Status(
        attempt=number, state="running", from_step=0, step=50, steps=200, epoch=2.5, epochs=10.0, miou=0.41, workers=2,
        started_at=ago(updated_s + 1800), updated_at=ago(updated_s), seconds=1800.0, first_step_after_s=30.0,
        saved_step=40, saved_after_s=1500.0, nodes={"gpu_spot": 2}, price_per_hour=2.0, images_per_second=81.26,
    )  # fmt: skip
    return dataclasses.replace(plain, **others)


def make_run(url: str, *statuses: Status) -> str:
    """A run folder with a config, an attempt's record for each status, and the statuses."""
    storage.write_bytes(storage.join(url, "config.yaml"), config.dump(tiny_settings("stores/none", url)).encode())
    for one in statuses:
        runlog.claim_attempt(url, {"from_step": one.from_step, "started_at": one.started_at, "workers": one.workers})
        status.write(url, one)
    return url


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result, by name."""
    return {row["name"]: row for row in found["runs"]}


def test_runs_are_listed_newest_first(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run is a row with its state, score, progress and cost, on any file system; what is no run is left out."""
    make_run(storage.join(any_root, "old"), attempt(1, 200000, state="stopped"))
    make_run(
        storage.join(any_root, "new"),
        attempt(1, 4000, state="preempted", miou=0.5),
        attempt(2, 10, from_step=40, first_step_after_s=180.0, miou=0.45),
    )
    storage.write_bytes(storage.join(any_root, "notes", "read.me"), b"no run")
    storage.write_bytes(storage.join(any_root, "config.txt"), b"no folder")
    rows = runs(any_root)["runs"]
    assert [(row["name"], row["state"], row["attempts"]) for row in rows] == [
        ("new", "running", 2),
        ("old", "stopped", 1),
    ]
    new = rows[0]
    assert new["run"] == storage.join(any_root, "new")
    assert (new["miou"], new["epoch"], new["epochs"], new["workers"]) == (0.5, 2.5, 10.0, 2)
    assert new["cost"] == pytest.approx(2.0)
    assert new["wasted_seconds"] == pytest.approx(300 + 180)
    assert new["redone_steps"] == 10
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        "run", "state", "mIoU", "epochs", "attempts", "workers", "images/s", "cost (wasted)", "updated",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", lines[1])[:8] == [
        "new", "running", "0.5000", "2.5/10", "2", "2", "81.3", "2.00 (0.27)",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", lines[2])[-1] == "2 days ago"


def test_a_run_without_a_sign_of_life_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that says it is running, but has said nothing for over five minutes, is lost; the table says since when."""
    make_run(str(tmp_path / "silent"), attempt(1, 12 * 60))
    make_run(str(tmp_path / "quiet"), attempt(1, 4 * 60))
    make_run(str(tmp_path / "stopped"), attempt(1, 12 * 60, state="stopped"))
    rows = by_name(runs(str(tmp_path)))
    assert {name: row["state"] for name, row in rows.items()} == {
        "silent": "lost", "quiet": "running", "stopped": "stopped",
    }  # fmt: skip
    assert "lost: silent for 12 min" in capsys.readouterr().out


def test_the_result_decides(tmp_path: Path) -> None:
    """With RUN/result.json a run is finished, whatever the status of a killed attempt says."""
    url = make_run(str(tmp_path / "run"), attempt(1, 4000))
    result = {"state": "finished", "miou": 0.61, "step": 200, "steps": 200, "images_per_second": 44.0}
    storage.write_json(storage.join(url, "result.json"), result)
    row = by_name(runs(str(tmp_path)))["run"]
    assert {key: row[key] for key in result} == result


def test_runs_without_a_status_are_listed(tmp_path: Path) -> None:
    """A run before its first attempt is prepared; one that an earlier version trained is known by its result alone."""
    make_run(str(tmp_path / "waiting"))
    for name in ("earlier", "unsaid"):
        url = make_run(str(tmp_path / name))
        runlog.claim_attempt(url, {"from_step": 0, "started_at": ago(100), "workers": 3})
    done = {"state": "finished", "miou": 0.7, "step": 9, "steps": 9, "attempts": 4, "images_per_second": 12.0}
    storage.write_json(str(tmp_path / "earlier" / "result.json"), done)
    rows = by_name(runs(str(tmp_path)))
    assert {name: row["state"] for name, row in rows.items()} == {
        "waiting": "prepared", "unsaid": "unknown", "earlier": "finished",
    }  # fmt: skip
    assert (rows["unsaid"]["attempts"], rows["unsaid"]["workers"], rows["unsaid"]["epochs"]) == (1, 3, 2)
    assert (rows["earlier"]["attempts"], rows["earlier"]["epoch"], rows["earlier"]["cost"]) == (4, 2, None)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("status/0001.json", b"{"),
        ("status/0001.json", json.dumps({**attempt(1).to_json(), "updated_at": "noon"}).encode()),
        ("result.json", b"[]"),
        ("result.json", b'{"miou": "good"}'),
        ("result.json", b"\xff"),
    ],
)
def test_a_damaged_run_is_a_row(any_root: str, capsys: pytest.CaptureFixture[str], file: str, data: bytes) -> None:
    """A run whose small files cannot be read is listed as damaged with the reason; the others are as they are."""
    make_run(storage.join(any_root, "good"), attempt(1))
    url = make_run(storage.join(any_root, "bad"), attempt(1))
    storage.write_bytes(storage.join(url, file), data)
    rows = by_name(runs(any_root))
    assert (rows["good"]["state"], rows["good"]["problem"]) == ("running", None)
    assert rows["bad"]["state"] == "damaged"
    assert rows["bad"]["problem"]
    assert "bad is damaged: " in capsys.readouterr().out


def test_one_run_folder_is_shown_alone(any_root: str) -> None:
    """Given a run folder itself, that one is the table."""
    url = make_run(storage.join(any_root, "one"), attempt(1))
    make_run(storage.join(any_root, "two"), attempt(1))
    assert [row["run"] for row in runs(url)["runs"]] == [url]


def test_what_is_a_run() -> None:
    """A run folder has a config and attempts; a sweep, a checkpoint and a folder of settings are none."""
    assert is_run(["attempts", "config.yaml", "metrics"])
    assert is_run(["config.yaml", "status"])
    assert is_run(["config.yaml"])
    assert not is_run(["config.yaml", "trials", "sweep.json"])
    assert not is_run(["config.yaml", "manifest.json", "state.json"])
    assert not is_run(["attempts"])
    assert not is_run([])


def test_no_run_at_all_says_where_to_look(tmp_path: Path) -> None:
    """A folder without runs, or none at all, is an error that says what a run is."""
    for url in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(ConfigError, match=r"no run at .* or directly below it"):
            runs(url)


def test_json_has_it_all(tmp_path: Path) -> None:
    """--json writes every fact of every run, through the command line."""
    make_run(str(tmp_path / "runs" / "one"), attempt(1))
    file = tmp_path / "out.json"
    assert main_of("runs", [str(tmp_path / "runs"), "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["runs"]
    assert row["nodes"] == {"gpu_spot": 2}
    assert row["price_per_hour"] == 2.0
    assert row["cost_per_epoch"] == pytest.approx(0.4)


def test_many_runs_are_read_at_once(any_root: str) -> None:
    """More runs than threads are all listed, once each."""
    names = [f"run-{number:02d}" for number in range(20)]
    for name in names:
        make_run(storage.join(any_root, name), attempt(1))
    assert sorted(by_name(runs(any_root))) == names


def test_a_real_run_is_listed(tmp_path: Path) -> None:
    """What training itself leaves behind is a row: finished, with its score and all its epochs."""
    from sceneray.training import Runtime, fit

    store = town_store(str(tmp_path / "store"))
    settings = tiny_settings(store.url, str(tmp_path / "runs" / "town"))
    storage.write_bytes(storage.join(settings.run, "config.yaml"), config.dump(settings).encode())
    result = fit(settings, Runtime())
    (row,) = runs(str(tmp_path / "runs"))["runs"]
    assert (row["name"], row["state"], row["problem"]) == ("town", "finished", None)
    assert (row["miou"], row["epoch"], row["epochs"], row["attempts"]) == (result["miou"], 2, 2, 1)


def test_a_terminal_cuts_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In a narrow terminal every cell is shown whole, and what looks like markup is text."""
    names = ["[red]a-run-with-a-rather-long-name-that-fills-a-line", "b"]
    for name in names:
        make_run(str(tmp_path / name), attempt(1))
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    runs(str(tmp_path))
    out = capsys.readouterr().out
    assert all(text in out for text in (*names, "running", "0.4100", "1.00 (0.00)", "updated"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (123456789, "123 MB"), (5e15, "5000.0 TB")],
)
def test_sizes_in_words(count: float, text: str) -> None:
    """Bytes are told in the unit that leaves few digits."""
    assert tables.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (754, "13 min"), (7200, "2 h"), (200000, "2 days")]
)
def test_ages_in_words(seconds: float, text: str) -> None:
    """An age is told in its largest unit."""
    assert tables.age(seconds) == text
