"""Nodes that come, go and are drained, on a real cluster of several raylets: the run follows and loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sceneray import checkpoint, config, runlog, status, storage
from sceneray.data.store import Store
from sceneray.training import Runtime, fit
from tests.commands import Command
from tests.metadata import FakeEc2, serving
from tests.stores import tiny_settings
from tests.support import free_port

pytestmark = pytest.mark.chaos
EPOCHS = 50


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster whose head has no room for workers; nodes are added by the test."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        made.shutdown()


def settings_of(store: str, run: str, *overrides: str) -> config.TrainSettings:
    """A long run of one or two workers that looks for room all the time."""
    resources = "resources={gpu: false, resize_check_s: 3, start_timeout_s: 15, place_timeout_s: 120}"
    slow = ("augment.crop=[96, 128]", "model.norm=sync", "optimizer.lr=0.001")
    return tiny_settings(
        store, run, "workers=1-2", resources, *slow, "log={every_steps: 1, contact_sheet: 0, samples: true}", *overrides
    )


def drain_by_command(address: str, node: str, folder: Path) -> float:
    """Drain a node with Ray's own command; returns when that took effect, at the latest."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    done = subprocess.run(
        [*command, "--deadline-remaining-seconds", "300"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return time.time()


def drain_by_notice(address: str, node: str, folder: Path) -> float:
    """Let `sceneray watch` see a spot notice of EC2's; returns when the notice was served first."""
    cloud = FakeEc2()
    with serving(cloud) as url:
        command = [sys.executable, "-m", "jobs.watch", "--cloud", "ec2", "--metadata-url", url, "--every", "1"]
        with (folder / "watch.txt").open("wb") as log:
            watcher = subprocess.Popen([*command, "--node-id", node, "--address", address], stdout=log, stderr=log)
        try:
            announced_at = time.time()
            cloud.announce(announced_at + 300)
            assert watcher.wait(60) == 0, (folder / "watch.txt").read_text()
        finally:
            watcher.kill()
            watcher.wait()
    return announced_at


def has_trained(run: str, attempt: int, steps: int) -> bool:
    """True once an attempt has come so many steps past where it began, as its own records say."""
    folder = storage.join(run, "metrics", f"attempt-{attempt:04d}")
    rows = [json.loads(line) for name in storage.list_names(folder) for line in read(folder, name).splitlines()]
    train = [row["step"] for row in rows if row["kind"] == "train"]
    return len(train) >= steps


def read(folder: str, name: str) -> str:
    """One file of a folder, as text."""
    return storage.read_bytes(storage.join(folder, name)).decode()


@pytest.mark.slice
def test_the_run_grows_and_shrinks_with_the_cluster(store: str, tmp_path: Path, cluster: Any) -> None:
    """1 → 2 → 1 workers: every sample of every epoch is used exactly once in the surviving history, and the loss is
    that of a run whose size never changed."""
    run, fixed = str(tmp_path / "run"), str(tmp_path / "fixed")
    length = (f"epochs={EPOCHS}", f"eval_every={EPOCHS}", "save={every_steps: 60, keep: 99}")
    cluster.add_node(num_cpus=1)
    command = Command(settings_of(store, run, *length), tmp_path, "--address", cluster.address)
    command.until(lambda: len(runlog.attempts(run)) == 1 and has_trained(run, 1, 5))
    node = cluster.add_node(num_cpus=1)
    command.until(lambda: len(runlog.attempts(run)) >= 2 and has_trained(run, 2, 5))
    cluster.remove_node(node, allow_graceful=False)
    assert command.wait() == 0, command.text()

    records = runlog.attempts(run)
    sizes = [record["workers"] for record in records]
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 2, 1), sizes
    used, again = runlog.read_samples(run)
    positions = [position for step in sorted(used) for rank in used[step] for position in rank]
    scenes = Store.open(store).rows("train")
    assert positions == list(range(EPOCHS * scenes)), "each sample of each epoch once, in the order of one worker"
    fit(settings_of(store, fixed, *length, "workers=1"), Runtime())
    losses = [[row["loss"] for row in runlog.read_metrics(one) if row["kind"] == "train"] for one in (run, fixed)]
    first = records[1]["from_step"]
    # Sums over two workers round otherwise, and SGD carries a rounding on: the first steps agree closely.
    assert losses[0][: first + 5] == pytest.approx(losses[1][: first + 5], rel=1e-3)
    difference = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    grown = status.read_all(run)[0]
    assert grown.step - records[1]["from_step"] < 30, "a resize saves first: it does not wait for step 60"
    starts = [record["from_step"] for record in records]
    print(f"workers {sizes}, from steps {starts}; {again} samples used again by steps that were redone")
    print(f"losses differ from the fixed run's by at most {difference:.1e} of them; the log says {notes(run)}")


@pytest.mark.slice
def test_what_cannot_be_placed_ends_with_what_is_missing(store: str, tmp_path: Path, cluster: Any) -> None:
    """Three workers on a cluster with room for one: after the time that the settings give, a sentence says what was
    asked, what there is, and what to do."""
    cluster.add_node(num_cpus=1)
    short = "resources={gpu: false, start_timeout_s: 5, place_timeout_s: 20}"
    settings = settings_of(store, str(tmp_path / "run"), "workers=3", short)
    command = Command(settings, tmp_path, "--address", cluster.address)
    assert command.wait() == 1, command.text()
    assert "no worker has run for" in command.text()
    assert "3 workers need 3 CPU; the cluster has 1 CPU on 2 node(s), room for 1. Lower workers" in command.text()


def storage_time(run: str) -> float:
    """When RUN/last was written, as a time stamp."""
    return Path(run, "last").stat().st_mtime


def notes(run: str) -> list[str]:
    """What the attempts' logs say of restarts."""
    lines = []
    for attempt in runlog.attempts(run)[1:]:
        folder = f"{run}/logs/attempt-{attempt['attempt']:04d}/rank-000"
        text = "".join(read(folder, name) for name in storage.list_names(folder))
        lines += [line.partition("INFO ")[2] for line in text.splitlines() if "to redo" in line]
    return lines


@pytest.mark.parametrize("drain", [drain_by_command, pytest.param(drain_by_notice, marks=pytest.mark.slice)])
def test_a_drained_node_is_left_with_everything_saved(
    store: str, tmp_path: Path, cluster: Any, drain: Callable[[str, str, Path], float]
) -> None:
    """`ray drain-node`, or a notice that the watcher sees, in mid-epoch: the workers save and leave within seconds, no
    step is lost, and the run goes on where there is room while the drained node still stands."""
    run = str(tmp_path / "run")
    keeps = cluster.add_node(num_cpus=1)
    goes = cluster.add_node(num_cpus=1)
    assert keeps.node_id != goes.node_id
    length = ("epochs=60", "eval_every=60", "save={every_s: 3600, keep: 99}")
    command = Command(settings_of(store, run, *length), tmp_path, "--address", cluster.address)
    command.until(lambda: len(runlog.attempts(run)) == 1 and has_trained(run, 1, 3))
    assert runlog.attempts(run)[0]["workers"] == 2
    told_at = drain(cluster.address, goes.node_id, tmp_path)
    command.until(lambda: len(checkpoint.names(run)) >= 1 and storage.is_file(f"{run}/last"))
    saved_s = storage_time(run) - told_at
    command.until(lambda: len(runlog.attempts(run)) >= 2 and has_trained(run, 2, 1))
    first = status.read_all(run)[0]
    second = runlog.attempts(run)[1]
    assert first.state == "preempted"
    assert second["workers"] == 1, "the drained node is no room"
    assert first.step == first.saved_step == second["from_step"], "no step is done twice"
    os.kill(command.process.pid, 2)
    assert command.wait() == 75, command.text()
    rows = [row for row in runlog.read_metrics(run) if row["kind"] == "train" and row["step"] <= first.step]
    step_s = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    assert all(later["step"] == sooner["step"] + 1 for sooner, later in pairwise(rows))
    assert saved_s < 60, "long before the deadline"
    print(f"{drain.__name__}: saved after {saved_s:.1f} s, at steps of {step_s:.2f} s; left at once, 0 steps redone")
