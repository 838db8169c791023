"""`sceneray predict` through Ray: photos in folders and in a bucket, and a thousand of them through kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from jobs.cli import main_of
from jobs.ray_session import ray_session
from sceneray import storage
from tests.batches import changed_at, check_masks, draw, lines
from tests.bundles import half_bright, write_bundle
from tests.commands import command_line, descendants
from tests.support import ROOT, S3

LIMIT_S = 300
PHOTOS = 1000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def cluster(weed_server: S3) -> Iterator[None]:
    """A Ray with two CPUs whose workers reach the S3 server; verbs of this process join it."""
    with ray_session(cpus=2):
        yield


def test_a_folder_of_photos(cluster: None, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 photos and a damaged one: a mask and a line each at its path, the summary, exit code 1. The same command again
    writes nothing; with the damaged one mended it does that part alone."""
    draw(tmp_path / "in", 40)
    bad = tmp_path / "in" / "day-2" / "bad.png"
    bad.write_text("no photograph")
    out, result = tmp_path / "out", tmp_path / "result.json"
    command = [str(tmp_path / "in"), "--out", str(out), "--bundle", bundle, "--workers", "2", "--json", str(result)]
    assert main_of("predict", command) == 1
    captured = capsys.readouterr()
    assert "1 of 41 images failed; predictions.json" in captured.err
    assert captured.err.count(f"{bad}: the photo cannot be read") == 1
    assert [line.split()[0] for line in captured.out.splitlines()[:4]] == ["class", "dark", "bright", "never"]
    rows = lines(str(out))
    assert [row["image"] for row in rows] == sorted(str(path) for path in (tmp_path / "in").rglob("*.png"))
    assert [row["image"] for row in rows if "error" in row] == [str(bad)]
    good = [row for row in rows if "error" not in row]
    assert [f"{tmp_path}/in/{row['mask']}" for row in good] == [row["image"][:-4] + ".mask.png" for row in good]
    check_masks(str(out), good[::7], bundle)
    summary = json.loads((out / "predictions.json").read_text())
    assert (summary["photos"], summary["masks"], summary["failed"], summary["parts"]) == (41, 40, 1, 6)
    assert summary["errors"] == [{key: row[key] for key in ("image", "error")} for row in rows if "error" in row]

    before = changed_at(out)
    assert main_of("predict", command) == 1
    assert changed_at(out) == before
    Image.fromarray(half_bright()[0]).save(bad)
    assert main_of("predict", command) == 0
    summary = json.loads(result.read_text())
    assert (summary["masks"], summary["failed"], summary["kept"]) == (41, 0, {"parts": 5, "photos": 33})
    part = next(i for i in range(6) if str(bad) in (out / f"predictions/part-{i:05}.jsonl").read_text())
    written = {name for name, when in changed_at(out).items() if when != before.get(name)}
    redone = {row["mask"] for row in rows[part * 8 : part * 8 + 8] if "mask" in row}
    assert written == {"predictions.json", f"predictions/part-{part:05}.jsonl", "day-2/bad.mask.png", *redone}


def test_a_bucket(cluster: None, bundle: str, weed_server: S3, tmp_path: Path) -> None:
    """s3:// in and out and bundle: a folder in a bucket is a batch by itself, and keeps the paths below it."""
    stored = write_bundle(weed_server.url("bundle"))
    draw(tmp_path, 12)
    for path in tmp_path.rglob("*.png"):
        url = weed_server.url("in", str(path.relative_to(tmp_path)))
        storage.write_bytes(url, path.read_bytes())
    out = weed_server.url("out")
    command = [weed_server.url("in") + "/", "--out", out + "/", "--bundle", stored, "--overlay"]
    assert main_of("predict", command) == 0
    rows = lines(out)
    assert [row["image"] for row in rows] == sorted(
        weed_server.url("in", *name.parts[-2:]) for name in tmp_path.rglob("*.png")
    )
    here = [{**row, "image": str(tmp_path / row["image"].partition("/in/")[2])} for row in rows]
    check_masks(out, here, bundle)
    names = {name for name, _ in storage.walk_files(out)}
    assert {row["mask"] for row in rows} | {row["overlay"] for row in rows} <= names
    assert storage.read_json(storage.join(out, "predictions.json"))["masks"] == 12
    assert main_of("predict", command) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--address joined --cpus 64", "a worker needs 64 CPU, and no node of the cluster has them. Lower --cpus"),
        ("--workers 1-2 --device cuda", "a worker needs 1 CPU and a GPU, and no node"),
    ],
)
def test_a_worker_that_fits_nowhere(
    cluster: None, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    """More than any node of the private Ray has is refused, with what can be done, and not waited for."""
    draw(tmp_path / "in", 1)
    command = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--bundle", bundle, *options.split()]
    assert main_of("predict", command) == 2
    assert said in capsys.readouterr().err


class Predicting:
    """`sceneray predict` as a process of its own, with a private Ray."""

    def __init__(self, folder: Path, bundle: str) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.result = folder / "result.json"
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        words = [str(folder / "in"), "--out", str(self.out), "--bundle", bundle, "--workers", "2"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.predict", *words, "--json", str(self.result)],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finished_parts(self) -> dict[str, int]:
        """When each finished part was written."""
        return {name: at for name, at in changed_at(self.out / "predictions").items() if name.endswith(".jsonl")}

    def until_parts(self, count: int) -> None:
        """Wait until so many parts are finished, while it runs."""
        deadline = time.monotonic() + LIMIT_S
        while not (self.out / "predictions").exists() or len(self.finished_parts()) < count:
            assert self.process.poll() is None, f"it ended early: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited in vain: {self.log.read_text()}"
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        return [pid for pid in descendants(self.process.pid) if "ray::PredictWorker" in command_line(pid)]

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the driver alone. Returns once its workers have ended by themselves; what it started."""
        started = [psutil.Process(pid) for pid in descendants(self.process.pid)]
        workers = [psutil.Process(pid) for pid in self.workers()]
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=LIMIT_S)
        assert alive == [], "workers live on without their driver"
        return started


@pytest.mark.chaos
def test_a_thousand_photos_killed_and_resumed(bundle: str, tmp_path: Path) -> None:
    """SIGKILL to the driver in the middle of 1,000 photos; the same command keeps the finished parts, loses a worker to
    SIGKILL on its way, and ends with one line and the right mask for every photo."""
    draw(tmp_path / "in", PHOTOS)
    first = Predicting(tmp_path, bundle)
    first.until_parts(40)
    started = first.kill()
    out = first.out
    assert not (out / "predictions.json").exists()
    kept, before = first.finished_parts(), changed_at(out)
    assert 40 <= len(kept) < 125
    masks = {row["mask"] for row in lines(str(out))}
    assert len(masks) == 8 * len(kept)

    second = Predicting(tmp_path, bundle)
    second.until_parts(len(kept) + (125 - len(kept)) // 3)
    os.kill(second.workers()[0], signal.SIGKILL)
    assert second.process.wait(LIMIT_S) == 0, second.log.read_text()
    assert f"keeping {len(kept)} finished parts of 125" in second.log.read_text()
    after = changed_at(out)
    again = {name for name in [*masks, *(f"predictions/{part}" for part in kept)] if after[name] != before[name]}
    assert again == set(), "what was finished was done again"
    rows = lines(str(out))
    assert [row["image"] for row in rows] == sorted(str(path) for path in (tmp_path / "in").rglob("*.png"))
    assert not any("error" in row for row in rows)
    assert len({row["sha256"] for row in rows}) > 1
    for row in rows:
        assert storage._digest((out / row["mask"]).read_bytes()) == row["sha256"]
    check_masks(str(out), rows[::40], bundle)
    summary = json.loads(second.result.read_text())
    assert (summary["photos"], summary["masks"], summary["failed"]) == (PHOTOS, PHOTOS, 0)
    assert summary["kept"] == {"parts": len(kept), "photos": len(masks)}
    assert summary["deaths"] >= 1
    print({key: summary[key] for key in ("kept", "deaths", "workers", "seconds", "images_per_second")})

    third = Predicting(tmp_path, bundle)
    assert third.process.wait(LIMIT_S) == 0
    assert "private Ray" not in third.log.read_text()
    assert changed_at(out) == after
    _, alive = psutil.wait_procs(started, timeout=LIMIT_S)
    assert alive == [], "of the killed driver's Ray something lives on"
