"""`sceneray watch` against a real two-node Ray on this machine: a head, and a worker that a fake EC2 takes away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import watch
from jobs.notices import Ec2, Notice
from jobs.watch import DrainError, Node, NoNodeError, drain, nodes_here
from sceneray.errors import ConfigError, ScenerayError
from tests.metadata import EC2_ACTION, EC2_REBALANCE, FakeEc2, Reply, always, serving
from tests.support import POLL_S, ROOT, end_group, free_port

TOKEN = "0dd1" * 10
# A driver that keeps an actor on the worker, tells when the worker drains, lets go, and tells how the worker ended.
HOLDER = """
import json, sys, time
import ray
from ray._private.state import state

def until(condition):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise SystemExit("waited in vain")

@ray.remote(num_cpus=0, resources={"spot": 1})
class Holder:
    def node(self):
        return ray.get_runtime_context().get_node_id()

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
holder = Holder.remote()
node = ray.get(holder.node.remote())
print(json.dumps(node), flush=True)
print(json.dumps(until(state.get_draining_nodes)), flush=True)
ray.kill(holder)
dead = lambda: [n["DeathReasonMessage"] for n in ray.nodes() if n["NodeID"] == node and not n["Alive"]]
print(json.dumps(until(dead)), flush=True)
"""


@dataclass(frozen=True)
class Head:
    """A running head: its port, its folder, and the environment of who knows its token."""

    port: int
    folder: Path
    environment: dict[str, str]

    def nodes(self, *, head: bool) -> list[Node]:
        """The nodes of this cluster, the head or the others; another Ray on this machine is not looked at."""
        return [node for node in nodes_here() if node.address.endswith(f":{self.port}") and node.is_head == head]


@contextlib.contextmanager
def ray_start(folder: Path, environment: dict[str, str], *options: str) -> Iterator[None]:
    """`ray start` with `options` for as long as the context; ended by its process group, never with `ray stop`."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", f"--temp-dir={folder}/ray",
        "--num-cpus=1", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", *options,
    ]  # fmt: skip
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(errors="replace") or process.poll() is not None)
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        yield
    finally:
        end_group(process)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return once `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(POLL_S)  # between two polls of the condition


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head on free ports with token authentication."""
    # Not pytest's folder: the path of a Unix socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="sr-", ignore_cleanup_errors=True) as name:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"PATH": path, "HOME": name, "LANG": "C.UTF-8", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        port = free_port()
        options = [f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        with ray_start(Path(name), environment, "--head", "--disable-usage-stats", *options):
            yield Head(port, Path(name), environment)


@pytest.fixture
def worker(head: Head) -> Iterator[Node]:
    """A second node, with one of the resource "spot"."""
    options = [f"--address=127.0.0.1:{head.port}", '--resources={"spot": 1}']
    with (
        tempfile.TemporaryDirectory(prefix="sr-", ignore_cleanup_errors=True) as name,
        ray_start(Path(name), head.environment, *options),
    ):
        (node,) = head.nodes(head=False)
        yield node


@contextlib.contextmanager
def watching(head: Head, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`sceneray watch WORDS` in a process of its own, which has the token and is not told the token mode."""
    environment = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_MODE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "jobs.watch", "--cloud", "ec2", *words], **options) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_notice_drains_this_node_once(head, worker, tmp_path):
    """The announced node drains with the notice's deadline and reason, by one request; the watcher then ends with 0."""
    cloud = FakeEc2()
    deadline = float(int(time.time()) + 100)
    command = [sys.executable, "-c", HOLDER, f"127.0.0.1:{head.port}"]
    result = tmp_path / "result.json"
    with (
        serving(cloud) as url,
        subprocess.Popen(command, env=head.environment, stdout=subprocess.PIPE, text=True) as holder,
        watching(head, "--metadata-url", url, "--node-id", worker.id, "--every", "0.2", "--json", str(result)) as child,
    ):
        try:
            assert json.loads(holder.stdout.readline()) == worker.id
            wait_for(lambda: cloud.tokens)
            assert child.poll() is None  # no notice yet: it waits
            cloud.announce(deadline)
            out, err = child.communicate(timeout=60)
            draining = json.loads(holder.stdout.readline())
            death = json.loads(holder.stdout.readline())
        finally:
            holder.kill()
    assert (child.returncode, out) == (0, f"drained {worker.id}\n"), err
    assert f"watching ec2's notices, every 0.2 s, for node {worker.id}" in err
    # Ray counts from when its command has started, which a loaded machine delays.
    assert draining.keys() == {worker.id}
    assert deadline - watch.START_S - 1 <= draining[worker.id] / 1000 <= deadline + watch.TRY_S
    assert death == ["sceneray watch: EC2 will terminate this spot instance"]
    assert json.loads(result.read_text())["notice"]["deadline"] == deadline
    (log,) = head.folder.glob("ray/session_2*/logs/gcs_server.out")
    assert log.read_text().count("HandleDrainNode, reason:") == 1


def test_the_head_is_not_drained(head):
    """On the head the watcher refuses when the notice comes: Ray would drain it, and so end the cluster."""
    (node,) = head.nodes(head=True)
    cloud = FakeEc2()
    cloud.announce(time.time() + 100)
    with serving(cloud) as url, watching(head, "--metadata-url", url, "--node-id", node.id) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err.splitlines()[-1].startswith(f"sceneray: node {node.id} is the cluster's head")
    assert head.nodes(head=True) == [node]


def test_a_node_of_another_machine_is_not_drained(head):
    """A node id that no raylet of this machine has is never drained; Ray itself would accept it without a word."""
    cloud = FakeEc2()
    cloud.announce(time.time() - 1)
    with serving(cloud) as url, watching(head, "--metadata-url", url, "--node-id", "ab" * 28) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "--node-id must be of a Ray node on this machine" in err.splitlines()[-1]


def test_without_a_notice_once_ends_at_once(head):
    """`--once` asks once and says that there is no notice; nothing is drained."""
    with serving(FakeEc2()) as url, watching(head, "--metadata-url", url, "--once") as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "no notice\n"), err


def test_the_watcher_outlives_faults_and_ends_on_sigterm(head):
    """Faults of the metadata server are told every 20 and end nothing; SIGTERM does, like Ctrl-C."""
    with serving(always(Reply(500))) as url, watching(head, "--metadata-url", url, "--every", "0.01") as child:
        told = next(line for line in child.stderr if "faults in a row" in line)
        assert "20 faults in a row, asking on; the last: PUT" in told
        assert "answered 500" in told
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 130


def test_a_recommendation_is_told_once_and_drains_only_where_asked(capsys):
    """EC2's recommendation is one line and the notice is waited for; with --on-rebalance it is the notice."""
    cloud = FakeEc2({EC2_REBALANCE: '{"noticeTime": "2026-11-05T08:22:00Z"}'})
    asked = []

    def respond(method, path, headers):
        asked.append(path)
        if asked.count(EC2_ACTION) == 5:
            cloud.announce(time.time() + 100)
        return cloud(method, path, headers)

    with serving(respond) as url:
        assert watch.wait_for(Ec2(url), 0.01, on_hint=True).kind == "rebalance"
        assert watch.wait_for(Ec2(url), 0.01, on_hint=False).kind == "terminate"
    assert capsys.readouterr().err.count("waiting for the notice itself") == 1


@pytest.fixture
def ray_command(monkeypatch, tmp_path):
    """Stand in for Ray's command with a shell script that also counts its calls; a worker node is here."""
    calls = tmp_path / "calls"

    def install(script: str) -> Callable[[], list[str]]:
        command = tmp_path / "ray"
        command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nn=$(wc -l < {calls})\n{script}\n')
        command.chmod(0o755)
        return lambda: calls.read_text().splitlines()

    monkeypatch.setattr(watch, "_ray", lambda: str(tmp_path / "ray"))
    monkeypatch.setattr(watch, "nodes_here", lambda: [Node("ab" * 28, "10.0.0.1:6379", is_head=False)])
    monkeypatch.setattr(watch, "FIRST_WAIT_S", 0.01)
    return install


def test_a_drain_that_fails_is_tried_again(ray_command):
    """A cluster that does not answer at first is asked until it does, each time with what is left of the time."""
    calls = ray_command('[ "$n" -ge 3 ] || { echo "Timed out" >&2; exit 1; }')
    assert drain(Notice("terminate", time.time() + 100, "text"), None, None) == "ab" * 28
    assert len(calls()) == 3
    assert "drain-node --address=10.0.0.1:6379" in calls()[0]
    left = [int(call.rpartition("--deadline-remaining-seconds=")[2]) for call in calls()]
    assert all(80 <= seconds <= 97 for seconds in left)


def test_trying_ends_with_the_deadline(ray_command):
    """Past the deadline nothing is tried again: the last reason is the error."""
    calls = ray_command('echo "Timed out at the end" >&2; exit 1')
    with pytest.raises(DrainError, match="Timed out at the end"):
        drain(Notice("terminate", time.time() - 5, "text"), None, None)
    assert len(calls()) == 1
    assert calls()[0].endswith("--deadline-remaining-seconds=0")


def test_a_refusal_is_not_tried_again(ray_command):
    """Where Ray does not accept the drain, its reason is told once; without a deadline none is named."""
    calls = ray_command('echo "Error: The drain request is not accepted: busy" >&2; exit 1')
    with pytest.raises(ScenerayError, match=r"Ray refuses to drain .* not accepted: busy"):
        drain(Notice("rebalance", None, "text"), None, None)
    assert len(calls()) == 1
    assert "deadline" not in calls()[0]


def test_of_several_nodes_one_must_be_named(ray_command, monkeypatch):
    """Where two Rays share a machine the watcher does not guess."""
    both = [Node(byte * 28, "10.0.0.1:6379", is_head=False) for byte in ("ab", "cd")]
    monkeypatch.setattr(watch, "nodes_here", lambda: both)
    with pytest.raises(NoNodeError, match="name one with --node-id"):
        watch.this_node()
    assert watch.this_node("cd" * 28) == both[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every": 0.0}, "--every"),
        ({"every": float("nan")}, "--every"),
        ({"metadata_url": "ftp://here"}, "--metadata-url"),
        ({"cloud": "gcp", "on_rebalance": True}, "--on-rebalance"),
    ],
)
def test_wrong_arguments_are_refused_at_the_start(change, words):
    """What could not work when the notice comes is refused before the waiting."""
    args = {"every": None, "metadata_url": "http://127.0.0.1", "cloud": "auto", "on_rebalance": False}
    watch.check(SimpleNamespace(**args))
    with pytest.raises(ConfigError, match=words):
        watch.check(SimpleNamespace(**args | change))
