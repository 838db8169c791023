"""`sceneray watch`: when the cloud announces that it takes this machine away, tell Ray, which drains this node.

Ray alone never looks at a cloud's notice. It is told by its own command, `ray drain-node`, in a process that exists
only then: what waits meanwhile imports neither Ray nor torch. Node and address are read from the command line of this
machine's raylet. `ray drain-node` would look for them by starting a driver, which on the wrong address starts a whole
Ray; it accepts an unknown node without a word, and the head too, which then shuts down with all of the cluster.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.cli import main_of, say
from jobs.notices import LINK_LOCAL, NOTICES, MetadataError, Notice, Source, detect
from sceneray.errors import ConfigError, ScenerayError

HELP = "wait on a cluster's node for the cloud's notice that it is taken away, and have Ray drain it"
EXAMPLE = "sceneray watch --cloud ec2"
NOTES = """\
Runs on every worker that may be taken away; cluster.yaml starts it. It ends with 0 once Ray has accepted the drain:
a node is drained once. The cluster's token is found as Ray finds it (RAY_AUTH_TOKEN, ~/.ray/auth_token)."""

FAULTS_TOLD = 20  # so many unanswered questions in a row are worth a line
# Ray's command counts the deadline from when it has started; a deadline that is a little early is the safe side.
START_S = 3.0
TRY_S = 20.0  # one try of Ray's command, which itself waits longer for a cluster that does not answer
FIRST_WAIT_S, MOST_WAIT_S = 1.0, 8.0  # between two tries: doubled each time
NO_DEADLINE_S = 120.0  # how long to try where the notice has no deadline


class NoNodeError(ScenerayError):
    """It is not clear which Ray node this machine is; while Ray starts or is started anew that passes."""


class DrainError(ScenerayError):
    """Ray was not reached, or did not take the drain; it may the next time."""


@dataclass(frozen=True)
class Node:
    """A Ray node on this machine, and the address of its cluster."""

    id: str
    address: str
    is_head: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{NOTES}"
    parser.add_argument("--cloud", choices=["auto", *NOTICES], default="auto", help="whose notice (default: auto)")
    parser.add_argument("--metadata-url", metavar="URL", default=LINK_LOCAL, help=f"default: {LINK_LOCAL}")
    parser.add_argument("--node-id", metavar="ID", help="which node, where several run on this machine")
    parser.add_argument("--address", metavar="HOST:PORT", help="the cluster's GCS (default: the node's own)")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, help="between two questions (default: 5 or 1, by cloud)"
    )
    parser.add_argument("--on-rebalance", action="store_true", help="drain on EC2's rebalance recommendation already")
    parser.add_argument("--once", action="store_true", help="ask once, drain where there is a notice, and end")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns the cloud, the notice and the drained node."""
    check(args)
    cloud = detect(args.metadata_url) if args.cloud == "auto" else args.cloud
    source = NOTICES[cloud](args.metadata_url)
    every = args.every or source.every
    log(f"watching {cloud}'s notices, every {every:g} s, for {_described(args.node_id)}")
    notice = ask(source, args.on_rebalance) if args.once else wait_for(source, every, args.on_rebalance)
    if notice is None:
        print("no notice")
        return {"cloud": cloud, "notice": None, "node": None}
    node = drain(notice, args.node_id, args.address)
    print(f"drained {node}")
    return {"cloud": cloud, "notice": asdict(notice), "node": node}


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for an argument that could not work when the notice comes."""
    if args.every is not None and not 0 < args.every <= 60:
        raise ConfigError(f"--every must be above 0 and at most 60 seconds, got {args.every:g}.")
    if urlsplit(args.metadata_url).scheme != "http" or not urlsplit(args.metadata_url).hostname:
        raise ConfigError(f"--metadata-url must be http://HOST, got '{args.metadata_url}'.")
    if args.on_rebalance and args.cloud not in ("auto", "ec2"):
        raise ConfigError(f"--on-rebalance is of EC2 alone, got --cloud {args.cloud}. Leave it out.")


def ask(source: Source, on_hint: bool) -> Notice | None:
    """The notice that stands now; a hint counts as one where `on_hint`."""
    return source.notice() or (source.hint() if on_hint else None)


def wait_for(source: Source, every: float, on_hint: bool) -> Notice:
    """The notice, once there is one. A metadata server that fails is asked again, for as long as it takes."""
    faults = 0
    hinted = False
    while True:
        try:
            notice = source.notice()
            hint = None if notice or hinted else source.hint()
            if found := notice or (hint if on_hint else None):
                return found
            if hint:
                hinted = True
                log(f"{hint.text}; waiting for the notice itself (--on-rebalance would drain now)")
            if faults >= FAULTS_TOLD:
                log(f"the metadata server answers again, after {faults} faults")
            faults = 0
        except MetadataError as error:
            faults += 1
            if faults % FAULTS_TOLD == 0:
                log(f"{faults} faults in a row, asking on; the last: {error}")
        time.sleep(every)


def drain(notice: Notice, node_id: str | None, address: str | None) -> str:
    """Have Ray drain this node, trying again until the notice's deadline; returns the node's id.

    Raises ConfigError for the cluster's head, ScenerayError where Ray refuses, DrainError or NoNodeError where no try
    came through in time.
    """
    left = "" if notice.deadline is None else f", in {max(0.0, notice.deadline - time.time()):.0f} s"
    log(f"notice: {notice.text}{left}")
    until = time.time() + NO_DEADLINE_S if notice.deadline is None else notice.deadline
    wait = FIRST_WAIT_S
    while True:
        try:
            node = this_node(node_id)
            _drain_once(notice, node, address or node.address)
        except (DrainError, NoNodeError) as error:
            if time.time() + wait >= until:
                raise
            log(f"not drained yet: {error} Trying again in {wait:g} s.")
            time.sleep(wait)
            wait = min(2 * wait, MOST_WAIT_S)
        else:
            log(f"Ray drains node {node.id}")
            return node.id


def this_node(node_id: str | None = None) -> Node:
    """The worker node that this machine is. Raises NoNodeError for none or several, ConfigError for the head."""
    here = nodes_here()
    found = [node for node in here if node_id in (None, node.id)]
    known = ", ".join(sorted(node.id for node in here))
    if not here:
        raise NoNodeError("no Ray node runs on this machine. Start it with `ray start --address=...`.")
    if not found:
        raise NoNodeError(f"--node-id must be of a Ray node on this machine, got '{node_id}'. Here run: {known}.")
    if len(found) > 1:
        raise NoNodeError(f"several Ray nodes run on this machine: name one with --node-id. They are: {known}.")
    (node,) = found
    if node.is_head:
        raise ConfigError(
            f"node {node.id} is the cluster's head: a drained head shuts down and takes the cluster with it. Run the "
            "watcher on workers, and the head on a machine that is not taken away."
        )
    return node


def _described(node_id: str | None) -> str:
    """This node in words, or why there is none. No error yet: when the notice comes all may be in order."""
    try:
        return f"node {this_node(node_id).id}"
    except (NoNodeError, ConfigError) as error:
        return f"the node that runs here then. As of now: {error}"


def nodes_here() -> list[Node]:
    """The Ray nodes that run on this machine, from the command lines of their raylets."""
    import psutil

    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = process.info["cmdline"] or []
            options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
            if "node_id" in options and "gcs-address" in options:
                found.append(Node(options["node_id"], options["gcs-address"], "--head" in words))
    return found


def _drain_once(notice: Notice, node: Node, address: str) -> None:
    command = [
        _ray(), "drain-node", f"--address={address}", f"--node-id={node.id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message=sceneray watch: {notice.text}",
    ]  # fmt: skip
    if notice.deadline is not None:
        seconds = max(0, math.floor(notice.deadline - time.time() - START_S))
        command.append(f"--deadline-remaining-seconds={seconds}")
    try:
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=TRY_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DrainError(f"`ray drain-node` at {address} took more than {TRY_S:g} s.") from error
    if done.returncode == 0:
        return
    last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1][:300]
    if "not accepted" in last:
        raise ScenerayError(f"Ray refuses to drain node {node.id}: {last}")
    raise DrainError(f"`ray drain-node` at {address} failed ({done.returncode}): {last}")


def _ray() -> str:
    """Ray's command: that of this Python first, which fits the Ray that it would import."""
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise DrainError("there is no `ray` command here. Install Ray in the environment of `sceneray watch`.")
    return found


def _environment() -> dict[str, str]:
    """This environment, with the token mode where there is a token: Ray's command does not look by itself."""
    environment = dict(os.environ)
    token = Path("~/.ray/auth_token").expanduser()
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys() or token.is_file():
        environment.setdefault("RAY_AUTH_MODE", "token")
    return environment


def log(text: str) -> None:
    """A line with its time, for a log that is read days later."""
    say(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}")


if __name__ == "__main__":
    raise SystemExit(main_of("watch"))
