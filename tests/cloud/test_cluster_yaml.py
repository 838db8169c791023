"""cluster.yaml, checked without a cloud: Ray's own offline validation, and what that does not look at."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.metadata import FakeEc2, serving
from tests.support import POLL_S, ROOT

Config = dict[str, Any]


@pytest.fixture(scope="module")
def shipped() -> Config:
    """cluster.yaml as a mapping."""
    config: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def validate(config: Config) -> None:
    """What `ray up` checks before it asks a cloud anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def problems(config: Config) -> Iterator[str]:
    """What Ray lets pass and this project does not."""
    yield from size_problems(config)
    yield from access_problems(config)
    for name, node_type in config["available_node_types"].items():
        yield from node_problems(name, node_type, is_head=name == config["head_node_type"])


def size_problems(config: Config) -> Iterator[str]:
    """Limits that contradict each other, and machines that would never leave."""
    for name, node_type in config["available_node_types"].items():
        # Ray dies of this on the head, after the head was paid for.
        if node_type.get("min_workers", 0) > node_type.get("max_workers", config["max_workers"]):
            yield f"{name}: min_workers above max_workers"
        if node_type.get("min_workers", 0) > 0:
            yield f"{name}: min_workers keeps machines without work"
    if not 0 < config.get("idle_timeout_minutes", 0) <= 30:
        yield "idle_timeout_minutes is missing or long"


def access_problems(config: Config) -> Iterator[str]:
    """Who could use the cluster without being asked to."""
    text = yaml.safe_dump(config)
    if "0.0.0.0" in text or "::/0" in text:
        yield "something is open to every address"
    starts = [
        line for role in ("head", "worker") for line in config[f"{role}_start_ray_commands"] if "ray start" in line
    ]
    if len(starts) != 2:
        yield "head and worker must each start Ray once"
    for line in starts:
        before = line.split("ray start")[0]
        if "RAY_AUTH_MODE=token" not in before:
            yield f"a start without token authentication: {line}"
        if "ulimit -n 65536" not in before:
            yield f"a start with the default limit of open files: {line}"
        if "--head" in line and "--dashboard-host=127.0.0.1" not in line:
            yield f"a dashboard that does not listen on loopback alone: {line}"
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "the token is not brought to the nodes"
    if not any("RAY_AUTH_MODE=token" in line and ".bashrc" in line for line in config["setup_commands"]):
        yield "`ray exec` and `ray status` on a node do not know the token mode"


def node_problems(name: str, node_type: Config, is_head: bool) -> Iterator[str]:
    """What a machine of one type may do, and what it costs."""
    node = node_type["node_config"]
    spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    if is_head and spot:
        yield f"{name}: the head may be taken away"
    if is_head and node_type["resources"].get("CPU") != 0:
        yield f"{name}: tasks may run on the head"
    if node_type.get("labels", {}).get("market") != ("spot" if spot else "on-demand"):
        yield f"{name}: its market label and InstanceMarketOptions disagree"
    if spot and node["InstanceMarketOptions"].get("SpotOptions", {}).get("SpotInstanceType") != "one-time":
        yield f"{name}: a spot request that outlives the cluster"
    if not node.get("IamInstanceProfile"):
        yield f"{name}: no instance profile of its own"
    if not node.get("SecurityGroupIds"):
        yield f"{name}: Ray would make a security group that is open to the world"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{name}: IMDSv1 is allowed"
    if not node.get("ImageId"):
        yield f"{name}: Ray's default image is used"
    disks = [disk["Ebs"] for disk in node.get("BlockDeviceMappings", [])]
    if not disks or not all(disk.get("Encrypted") and disk.get("DeleteOnTermination") for disk in disks):
        yield f"{name}: a disk that is not encrypted, or stays"


def test_ray_accepts_the_file(shipped: Config) -> None:
    """`ray up` finds nothing wrong with cluster.yaml before it talks to AWS."""
    validate(shipped)


def test_ray_would_refuse_an_unknown_key(shipped: Config) -> None:
    """The offline validation is not vacuous: a misspelt key of a node type is refused."""
    import jsonschema

    broken = copy.deepcopy(shipped)
    broken["available_node_types"]["gpu_spot"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate(broken)


def test_nothing_that_ray_lets_pass_is_wrong(shipped: Config) -> None:
    """cluster.yaml keeps the project's own rules on size, access and cost."""
    assert list(problems(shipped)) == []


def test_the_machines_the_work_needs_are_there(shipped: Config) -> None:
    """There are spot GPU workers, on-demand GPU workers after them, and CPU workers."""
    types = shipped["available_node_types"]
    kinds = {(t["labels"]["pool"], t["labels"]["market"]): t for name, t in types.items() if name != "head"}
    assert {("gpu", "spot"), ("gpu", "on-demand"), ("cpu", "spot")} <= kinds.keys()
    assert kinds["gpu", "spot"]["priority"] > kinds["gpu", "on-demand"]["priority"]


def _set(path: str, value: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        *parents, last = path.split("/")
        node: Any = config
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(last) if isinstance(node, list) else last] = value

    return change


SPOT = "available_node_types/gpu_spot"
BROKEN = {
    "min_workers above max_workers": _set(f"{SPOT}/min_workers", 9),
    "idle_timeout_minutes": _set("idle_timeout_minutes", 0),
    "open to every address": _set("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0"),
    "without token authentication": _set("worker_start_ray_commands/1", "ulimit -n 65536; ray start --address=x"),
    "limit of open files": _set("worker_start_ray_commands/1", "export RAY_AUTH_MODE=token; ray start --address=x"),
    "listen on loopback alone": _set("head_start_ray_commands/1", "RAY_AUTH_MODE=token ray start --head"),
    "the token is not brought": _set("file_mounts", {}),
    "do not know the token mode": _set("setup_commands", []),
    "may be taken away": _set("available_node_types/head/node_config/InstanceMarketOptions", {"MarketType": "spot"}),
    "tasks may run on the head": _set("available_node_types/head/resources", {}),
    "market label": _set(f"{SPOT}/node_config/InstanceMarketOptions", {}),
    "outlives the cluster": _set(f"{SPOT}/node_config/InstanceMarketOptions", {"MarketType": "spot"}),
    "no instance profile": _set(f"{SPOT}/node_config/IamInstanceProfile", None),
    "open to the world": _set(f"{SPOT}/node_config/SecurityGroupIds", []),
    "IMDSv1": _set(f"{SPOT}/node_config/MetadataOptions", {}),
    "default image": _set(f"{SPOT}/node_config/ImageId", ""),
    "not encrypted": _set(f"{SPOT}/node_config/BlockDeviceMappings", []),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_each_rule_catches_what_it_is_for(shipped: Config, expected: str) -> None:
    """A cluster.yaml that breaks one rule is reported with that rule."""
    broken = copy.deepcopy(shipped)
    BROKEN[expected](broken)
    assert any(expected in problem for problem in problems(broken))


def test_images_hold_the_pinned_ray(shipped: Config) -> None:
    """The containers' Ray is the one that constraints.txt pins: job client and cluster agree."""
    images = re.findall(r"rayproject/ray:([0-9.]+)-", yaml.safe_dump(shipped))
    (pinned,) = re.findall(r"^ray(?:\[.*\])?==([0-9.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(images) == {pinned}


def test_mounted_files_are_in_the_repository(shipped: Config) -> None:
    """Every mounted file that is not the user's own exists at its path from the repository's root."""
    own = [source for source in shipped["file_mounts"].values() if not source.startswith("~")]
    assert {"constraints.txt", "pyproject.toml"} < set(own)
    assert all((ROOT / source).is_file() for source in own)


def test_setup_may_run_twice_and_installs_the_pinned_dependencies(shipped: Config, tmp_path: Path) -> None:
    """Ray runs the setup of a worker twice: the second time changes nothing, and pip gets the project's own list."""
    home, tools = tmp_path / "home", tmp_path / "bin"
    (home / "sceneray").mkdir(parents=True)
    tools.mkdir()
    for source in ("pyproject.toml", "constraints.txt"):
        (home / "sceneray" / source).write_bytes((ROOT / source).read_bytes())
    (tools / "python").symlink_to(sys.executable)
    pip = tools / "pip"
    pip.write_text('#!/bin/sh\necho "$@" >> "$HOME/pip.log"\n')
    pip.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    # The list goes to a place of the test's own, so that tests beside each other do not share it.
    commands = [line.replace("/tmp/requirements.txt", str(tmp_path / "list.txt")) for line in shipped["setup_commands"]]
    for _ in range(2):
        for command in commands:
            subprocess.run(["/bin/bash", "-c", command], env=environment, check=True, cwd=home)
    assert (home / ".bashrc").read_text() == "export RAY_AUTH_MODE=token\n"
    asked = (tmp_path / "list.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in asked)
    assert "boto3" in asked
    assert not any(line.startswith(("pytest", "sceneray")) for line in asked)
    calls = (home / "pip.log").read_text().splitlines()
    assert calls == [f"install --quiet --no-cache-dir -r {tmp_path}/list.txt -c constraints.txt"] * 2


@pytest.fixture
def node(shipped: Config, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The home of a worker with what cluster.yaml mounts there, and the environment of a shell on it."""
    home, tools = tmp_path / "home", tmp_path / "bin"
    for target, source in shipped["file_mounts"].items():
        if not source.startswith("~"):
            path = home / target.removeprefix("~/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / source).read_bytes())
    tools.mkdir()
    python = tools / "python"
    # Its installed packages without this repository, another metadata server, and a record of who was started.
    python.write_text(
        '#!/bin/sh\necho $$ >> "$HOME/started"\n'
        f'exec {shlex.quote(sys.executable)} "$@" ${{METADATA:+--metadata-url "$METADATA"}}\n'
    )
    python.chmod(0o755)
    yield home, {"HOME": str(home), "PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    for pid in map(int, (home / "started").read_text().split()):  # where a test failed half-way
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).environ().get("HOME") == str(home):
                psutil.Process(pid).kill()


def watcher_command(config: Config) -> str:
    """The one command that starts the watcher on a worker."""
    (command,) = [line for line in config["worker_start_ray_commands"] if "jobs.watch" in line]
    return str(command)


def test_what_is_mounted_is_enough_for_the_watcher(node: tuple[Path, dict[str, str]]) -> None:
    """From the mounted files alone the watcher shows its help, and asks a metadata server that wants IMDSv2."""
    home, environment = node
    options: Config = {"cwd": home / "sceneray/watch", "capture_output": True, "text": True, "check": True}
    shown = subprocess.run(["python", "-m", "jobs.watch", "--help"], env=environment, **options)
    assert "usage: sceneray watch" in shown.stdout
    code = "import jobs.watch, sceneray; print(jobs.watch.__file__, sceneray.__file__)"
    used = subprocess.run(["python", "-c", code], env=environment, **options)
    assert all(Path(file).is_relative_to(home) for file in used.stdout.split())
    cloud = FakeEc2()
    with serving(cloud) as url:
        once = ["python", "-m", "jobs.watch", "--cloud", "ec2", "--once"]
        asked = subprocess.run(once, env=environment | {"METADATA": url}, **options)
    assert asked.stdout == "no notice\n"
    assert len(cloud.tokens) == 1


def test_the_watcher_outlives_the_connection_and_is_alone(shipped: Config, node: tuple[Path, dict[str, str]]) -> None:
    """The start command returns, what it started survives a hang-up, and a second start leaves it alone."""
    home, environment = node
    command, cloud, started = watcher_command(shipped), FakeEc2(), home / "started"
    with serving(cloud) as url:
        options: dict[str, Any] = {"env": environment | {"METADATA": url}, "cwd": home, "start_new_session": True}
        # Ray wraps each command in parentheses. The pipe would stay open where the watcher kept the shell's output.
        with subprocess.Popen(["/bin/bash", "-c", f"({command})"], stdout=subprocess.PIPE, **options) as shell:
            assert shell.communicate(timeout=60)[0] == b""
        wait_until(lambda: cloud.tokens, home / "sceneray-watch.log")
        pid = int(started.read_text())
        try:
            os.killpg(shell.pid, signal.SIGHUP)
            again = subprocess.run(["/bin/bash", "-c", f"{command} wait $!"], timeout=60, check=False, **options)
            assert (again.returncode, started.read_text()) == (1, f"{pid}\n")  # 1 is flock's: the lock is taken
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(pid), home / "sceneray-watch.log")
    assert (home / "sceneray-watch.log").read_text().endswith("sceneray: interrupted\n")


def wait_until(condition: Callable[[], object], log: Path) -> None:
    """Return once `condition` holds; fail with the log after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "nothing was started"
        time.sleep(POLL_S)  # between two polls of the condition


def test_the_watcher_starts_after_ray_and_only_on_workers(shipped: Config) -> None:
    """Each worker starts Ray and then its watcher, with the cluster's token mode; the head starts none."""
    assert shipped["worker_start_ray_commands"][-1] == watcher_command(shipped)
    assert "RAY_AUTH_MODE=token" in watcher_command(shipped)
    assert not any("jobs.watch" in line for line in shipped["head_start_ray_commands"])
