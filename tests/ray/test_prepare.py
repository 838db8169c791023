"""`sceneray prepare` with real Ray tasks: killed in the middle, run again, and errors that cross Ray as a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from sceneray.data.images import decode_image, decode_label
from sceneray.data.store import Store
from sceneray.errors import DataError
from tests.support import ROOT
from tests.unit.data.test_folder import damage, write_source

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
LIMIT_S = 180


def command(*arguments: str) -> list[str]:
    """`sceneray prepare ...`."""
    return [sys.executable, "-m", "jobs.prepare", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def test_a_killed_prepare_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL after the first shard leaves no store; the same command keeps that shard and finishes the store, which
    plain pyarrow and pandas open."""
    url = tmp_path / "store"
    arguments = ("town", str(url), "--scenes", "400,20", "--size", "96x128", "--json", str(tmp_path / "result.json"))
    first = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + LIMIT_S
    while not list(url.glob(".shards/*.json")):
        assert first.poll() is None, "it ended before a shard was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    with pytest.raises(DataError, match="was never finished"):
        Store.open(str(url))
    kept = {path.name: path.stat().st_mtime_ns for path in url.glob("*.parquet")}

    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert "finished shards of" in again.stderr
    recorded = [name for name, changed in kept.items() if (url / name).stat().st_mtime_ns == changed]
    assert recorded, "no shard was kept"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["rows"] == {"train": 400, "val": 20}
    frame = pd.concat(pd.read_parquet(path) for path in sorted(url.glob("train-*.parquet")))
    assert list(frame.columns) == ["name", "image", "label", "height", "width"]
    assert list(frame["name"]) == [f"town-train-{i:06}" for i in range(400)]
    row = pq.read_table(sorted(url.glob("val-*.parquet"))[0]).to_pylist()[0]
    assert decode_image(row["image"]).shape == (row["height"], row["width"], 3)
    assert decode_label(row["label"]).shape == (96, 128)

    third = run(*arguments)
    assert third.returncode == 0
    assert "is up to date" in third.stderr
    changed = run("town", str(url), "--scenes", "400,21")
    assert changed.returncode == 1
    assert "scenes: {'train': 400, 'val': 20} → {'train': 400, 'val': 21}" in changed.stderr


def test_a_bad_label_stops_it_with_one_sentence(tmp_path: Path) -> None:
    """An error on a worker arrives as file, rule and fix, exit code 1, without a traceback; no store is left."""
    source = write_source(tmp_path / "source", ["train/a", "train/b", "val/c"])
    damage(tmp_path / "source", "rgb")
    done = run("folder", source, str(tmp_path / "store"))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sceneray:")]
    assert "labels/train/a.png" in line
    assert "turn its colours into ids" in line
    assert "Traceback" not in done.stderr
    with pytest.raises(DataError, match="was never finished"):
        Store.open(str(tmp_path / "store"))
