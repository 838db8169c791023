"""cluster.yaml, checked without a cloud: Ray's own offline validation, and what that does not look at."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT

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
    assert sorted(own) == ["constraints.txt", "pyproject.toml"]
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
