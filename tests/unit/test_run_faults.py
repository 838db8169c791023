"""A whole run whose store fails: on S3 behind a proxy that answers wrongly, and with the server away in mid-run."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from sceneray import checkpoint, retention, retries, runlog, storage
from sceneray.errors import CheckpointError
from sceneray.training import Runtime, fit
from tests.fault_proxy import FaultProxy, at_endpoint
from tests.stores import tiny_settings, town_store
from tests.support import S3, seaweed

# s3fs drops the connection of an answer that was cut short without closing it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
AWAY_S = 30.0


def weed(folder: Path) -> contextlib.AbstractContextManager[S3]:
    """A server of the test's own: one that others use must not go away."""
    (folder / "weed").mkdir()
    return seaweed(folder / "weed")


class Outage:
    """Takes the S3 server away once the run has come to `step`, for AWAY_S; notes how far training went meanwhile."""

    def __init__(self, server: Any, step: int) -> None:
        self.server = server
        self.step = step
        self.newest = 0
        self.notes: list[str] = []
        self.went_at: int | None = None
        self.came_at: int | None = None
        self.thread = threading.Thread(target=self._go_and_come)

    def see(self, row: dict[str, Any]) -> None:
        """A row of progress."""
        self.notes += [row["text"]] if row["kind"] == "note" else []
        if row["kind"] == "train":
            self.newest = row["step"]
            if self.went_at is None and self.newest >= self.step:
                self.went_at = self.newest
                self.thread.start()

    def _go_and_come(self) -> None:
        self.server.stop()
        time.sleep(AWAY_S)  # the outage itself
        self.came_at = self.newest
        self.server.start()


@pytest.mark.chaos
def test_a_run_outlives_a_store_that_fails_and_goes_away(tmp_path: Path) -> None:
    """One request in ten fails, and the server is away for 30 s: training goes on meanwhile, and the run ends with
    every checkpoint whole and the weights of an undisturbed run."""
    length = ("epochs=130", "eval_every=50", "save={every_steps: 20, keep: 100}", "augment.crop=[64, 96]")
    quiet = "log={every_steps: 1, contact_sheet: 0, tensorboard: false}"
    town_store(str(tmp_path / "store"))
    clean = str(tmp_path / "clean")
    fit(tiny_settings(str(tmp_path / "store"), clean, *length, quiet), Runtime())
    with weed(tmp_path) as s3, FaultProxy(s3.endpoint) as proxy, at_endpoint(proxy.endpoint, **s3.environment):
        s3fs.S3FileSystem().mkdir(s3.bucket)
        town_store(s3.url("store"))
        proxy.share = 0.1
        outage = Outage(s3.server, 60)
        run = s3.url("run")
        result = fit(tiny_settings(s3.url("store"), run, *length, quiet), Runtime(progress=outage.see))
        outage.thread.join()
        proxy.share = 0.0
        whole = [entry for entry in retention.entries(run) if entry.committed is not None]
        for entry in whole:
            checkpoint.load(storage.join(run, entry.name))
        rows = [row["step"] for row in runlog.read_metrics(run) if row["kind"] == "train"]
        found = checkpoint.load(storage.join(run, "last")).model
        folder = f"{run}/logs/attempt-0001/rank-000"
        text = "".join(storage.read_bytes(f"{folder}/{name}").decode() for name in storage.list_names(folder))
    assert (result["state"], result["step"], result["attempts"]) == ("finished", 390, 1)
    assert rows == list(range(1, 391))
    expected = checkpoint.load(storage.join(clean, "last")).model
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert outage.went_at is not None
    assert outage.came_at is not None
    assert outage.came_at > outage.went_at + 20, "training goes on while the store is away"
    retried, failed = text.count("failed, attempt"), text.count("saving fails since")
    assert failed > 0
    assert any(note.startswith("saving fails, training goes on") for note in outage.notes)
    assert any(note.startswith("saving works again") for note in outage.notes)
    steps = outage.came_at - outage.went_at
    print(
        f"\n{proxy.requests} requests, faults {dict(proxy.counts)}; server away {AWAY_S:g} s, {steps} steps meanwhile"
    )
    print(f"asked again {retried} times, {failed} saves failed at first, {len(whole)} committed checkpoints, all whole")


def test_a_store_that_never_comes_back_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `save.tolerate_s` without a successful save the run ends with one sentence; what was saved stays whole."""
    town_store(str(tmp_path / "store"))
    with weed(tmp_path) as s3, at_endpoint(s3.endpoint, **s3.environment):
        s3fs.S3FileSystem().mkdir(s3.bucket)
        run = s3.url("run")
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.02)
        often = ("epochs=1300", "eval_every=2000", "save={every_steps: 2, tolerate_s: 3}", "log.contact_sheet=0")

        with pytest.raises(
            CheckpointError, match=r"saving failed for \d+ s \(save.tolerate_s is 3\).* The last committed"
        ):
            fit(tiny_settings(str(tmp_path / "store"), run, *often), Runtime(on_saved=lambda _: s3.server.stop()))
        monkeypatch.undo()
        s3.server.start()
        assert checkpoint.load(storage.join(run, "last")).step >= 2
    assert "training goes on" in capsys.readouterr().err, "the log is not lost with the store"
