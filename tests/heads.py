"""A real `ray start --head` with token authentication on this machine, beside whatever other Ray runs here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support import ROOT, end_group, free_port

TOKEN = "5ce9e" * 8


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard, and the environment of a client that knows its token."""

    address: str
    environment: dict[str, str]
    log: Path


@contextlib.contextmanager
def running_head(**environment: str) -> Iterator[Head]:
    """`ray start --head` on free ports in a folder of its own; ended by its process group."""
    # Not pytest's folder: the path of a Unix socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="sr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        log = folder / "head.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                head_command(folder, port),
                cwd=folder,
                env=head_environment(folder) | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until_ready(address, process, log)
            yield Head(address, client_environment(folder), log)
        finally:
            end_group(process)


def head_command(folder: Path, port: int) -> list[str]:
    """The command that starts a head which shares no port and no folder with another Ray on this machine."""
    return [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--temp-dir={folder}/ray",
        "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
        "--object-store-memory=200000000", "--disable-usage-stats",
    ]  # fmt: skip


def head_environment(folder: Path) -> dict[str, str]:
    """What the head and so its jobs inherit: no PYTHONPATH, another home, this Python first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def client_environment(folder: Path) -> dict[str, str]:
    """What `sceneray submit` runs with: the repository's code, and the token."""
    code = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return head_environment(folder) | {"PYTHONPATH": code, "AWS_REGION": "eu-north-1", "AWS_SECRET_ACCESS_KEY": "mine"}


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the job server answers and knows a node that can run a job."""
    deadline = time.monotonic() + 120
    headers = {"Authorization": f"Bearer {TOKEN}"}
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)  # between two polls of the condition
    raise RuntimeError(f"the head did not come up:\n{log.read_text(errors='replace')[-3000:]}")
