"""`sceneray submit` against a real `ray start --head` with token authentication on this machine.

The head runs in a folder of its own and knows nothing of this repository: what a job imports was shipped with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT, free_port

TOKEN = "5ce9e" * 8


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard, and the environment of a client that knows its token."""

    address: str
    environment: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
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
                env=head_environment(folder),
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


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a head and everything it started, by its process group; `ray stop` would end every Ray on this machine."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def submit(head: Head, cwd: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`sceneray submit WORDS --address HEAD`, run in `cwd`."""
    command = [sys.executable, "-m", "jobs.submit", *words, "--address", head.address]
    return subprocess.run(
        command, cwd=cwd, env=env or head.environment, capture_output=True, text=True, timeout=300, check=False
    )
