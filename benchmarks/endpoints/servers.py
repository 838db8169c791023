"""The servers that are compared: how each is started, and how all stand side by side while one has its turn.

A shared machine changes its speed within minutes, by more than the servers differ. So all are up at once, and short
turns alternate: who has none is stopped (SIGSTOP, with every process below it) and costs nothing meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import yaml

from benchmarks.endpoints import tree
from benchmarks.peers.runs import ROOT
from sceneray.devices import usable_cores

READY_TIMEOUT_S = 120.0
SETTLE_S = 1.0  # after a pause: timers that ran out meanwhile fire
CLUSTER = "serve/config.cluster.yaml"


@dataclass(frozen=True)
class Kind:
    """`module`: of benchmarks.endpoints; None: `sceneray serve` with `options`. `haproxy`: as serve/config.cluster.yaml
    has it. `upload`: how the load generator sends photographs."""

    module: str | None = None
    options: tuple[str, ...] = ()
    haproxy: bool = False
    upload: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "fastapi": Kind("plain"),
    "litserve": Kind("lit", upload=("json",)),
    "sceneray": Kind(),
    "sceneray-haproxy": Kind(haproxy=True),
    "sceneray-together": Kind(options=("together=true",)),
    "sceneray-together-haproxy": Kind(options=("together=true",), haproxy=True),
    "tutorial": Kind("tutorial"),
}


@dataclass
class Server:
    """A server that answers at `url`."""

    url: str
    kind: Kind
    process: subprocess.Popen[bytes] = field(repr=False)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While it lasts the server runs; before and after it is stopped."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """CPU time of all its processes that still run."""
        seconds: float = tree.sample(psutil.Process(self.process.pid))["cpu"]["all"]
        return seconds

    def end(self) -> None:
        """End it and everything below it."""
        below = self._tree()
        self._signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        # HAProxy outlives the Ray that started it.
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, and how every server computes: as `sceneray serve` does by itself where it has the machine."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--bundle", help="default: a MobileNetV2 PSPNet with random weights")
    parser.add_argument("--photos", help="folder of JPEG files; default: drawn scenes of four sizes")
    half = max(1, usable_cores() // 2)
    parser.add_argument("--threads", type=int, default=half, help=f"CPU threads of a forward pass (default: {half})")
    parser.add_argument("--passes", type=int, default=2, help="forward passes at a time (default: 2)")


@contextlib.contextmanager
def server(name: str, bundle: str, threads: int, passes: int) -> Iterator[Server]:
    """A server that answers, with `passes` forward passes at a time of `threads` each; it ends with the context.

    Raises SystemExit with its last words where it does not answer.
    """
    from tests.support import free_port

    kind, port = KINDS[name], free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if kind.module is None:
        tuned = (f"threads={threads}", f"concurrent_batches={passes}")
        command = ["jobs.serve", bundle, "--port", str(port), *tuned, *kind.options]
    else:
        command = [f"benchmarks.endpoints.{kind.module}", bundle, str(port), str(threads), str(passes)]
    if kind.haproxy:
        environment |= haproxy_environment(free_port(), free_port())
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        found = Server(f"http://127.0.0.1:{port}", kind, process)
        try:
            _wait(found, said)
            yield found
        finally:
            found.end()


def haproxy_environment(metrics_port: int, stats_port: int) -> dict[str, str]:
    """What serve/config.cluster.yaml sets for Serve, with free ports and without the 30 s in which a replica drains."""
    config: dict[str, Any] = yaml.safe_load((Path(ROOT) / CLUSTER).read_text())
    variables: dict[str, str] = {}
    for part in (config["controller_options"], *config["applications"]):
        variables |= part["runtime_env"]["env_vars"]
    return variables | {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _wait(found: Server, said: IO[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if found.process.poll() is not None:
            said.seek(0)
            raise SystemExit(f"the server ended:\n{said.read().decode()[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            # LitServe has its own health path; any answer below 500 means that requests are taken.
            if any(httpx.get(found.url + path).status_code == 200 for path in ("/v2/health/ready", "/health")):
                return
        time.sleep(0.2)
    raise SystemExit(f"the server did not answer in {READY_TIMEOUT_S:g} s")
