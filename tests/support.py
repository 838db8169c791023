"""What tests of several tiers share: real data, free ports, the end of a Ray, a real S3 server, allowed skips."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.1  # between two looks at a condition that a test waits for
SHARED_MISSING = "../shared is not here"
UNTRACKED = {".git", ".venv", "__pycache__", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
SKIPS = Path(__file__).with_name("skips.txt")

# Names that every file system takes; a leading dot would be one of storage.py's own half-files.
file_names = st.text("abcXYZ019-_. ", min_size=1, max_size=12).filter(lambda name: name.strip(". ") == name)


def shared(relative: str) -> Path:
    """`../shared/relative` beside the repository: real data, never committed. Skips the test where it is absent."""
    path = ROOT.parent / "shared" / relative
    if not path.exists():
        pytest.skip(SHARED_MISSING)
    return path


def tracked_files() -> list[Path]:
    """Every file of the repository: what git tracks or would add, or all of them where this is no clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(part in UNTRACKED for part in path.parts)]
    return sorted(path for path in paths if path.is_file())


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a `ray start --block` and all it started, by its process group; `ray stop` would end every Ray here."""
    # First the command alone, which takes its node down in order; asked all at once, they would wait for each other.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Weed:
    """The process of a SeaweedFS server, which a test may stop and start again: its files and ports stay the same."""

    def __init__(self, command: list[str], folder: Path, endpoint: str, master: str) -> None:
        self.command = command
        self.folder = folder
        self.endpoint = endpoint
        self.master = master
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it can be read from and written to."""
        log = self.folder / "weed.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._is_ready():
                return
            time.sleep(POLL_S)
        raise RuntimeError(f"SeaweedFS did not come up:\n{log.read_text(errors='replace')[-3000:]}")

    def _is_ready(self) -> bool:
        """The S3 gateway answers seconds before the master knows its volume server; until then every read is a 500."""
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(self.endpoint, timeout=5, trust_env=False)
            status = httpx.get(f"{self.master}/dir/status", timeout=5, trust_env=False).json()
            return bool(status["Topology"]["Max"])
        return False

    def stop(self) -> None:
        """End it at once: asked nicely it takes 20 s to close its volumes."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class S3:
    """A real S3 server (SeaweedFS) with one bucket; `environment` is what a child process needs to reach it."""

    endpoint: str
    bucket: str
    environment: dict[str, str]
    server: Weed

    def url(self, *names: str) -> str:
        """`s3://BUCKET/name/...`."""
        return "/".join([f"s3://{self.bucket}", *names])


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[S3]:
    """A SeaweedFS S3 server on free loopback ports, its files in `folder`; it ends with the context."""
    keys = {"accessKey": "test-key", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": [keys], "actions": actions}]}))
    data = folder / "data"
    data.mkdir()
    s3_port, *others = _weed_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-s3", f"-s3.config={config}", f"-s3.port={s3_port}",
        "-s3.port.iceberg=0", "-s3.port.lance=0",  # fixed ports otherwise: a second server would die on them
        f"-master.port={others[0]}", f"-volume.port={others[1]}", f"-filer.port={others[2]}",
        "-master.electionTimeout=1s",  # started again after a kill, its only master elects itself
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{s3_port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = Weed(command, folder, endpoint, f"http://127.0.0.1:{others[0]}")
    try:
        server.start()
        yield S3(endpoint, "sceneray-test", environment, server)
    finally:
        server.stop()


def _weed_ports(count: int) -> list[int]:
    """Free ports whose twins 10000 above (gRPC) are free too, all below the range clients draw from."""
    ports: list[int] = []
    for port in random.sample(range(21000, 22700), 400):
        if _is_free(port) and _is_free(port + 10000):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports for SeaweedFS between 21000 and 22700")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class AllowedSkip:
    """One line of skips.txt: tests whose id starts with `prefix` may be skipped for a reason that contains `reason`."""

    prefix: str
    reason: str


def read_skips(text: str) -> list[AllowedSkip]:
    """The lines `prefix | reason` of a skip list; blank lines and lines that start with # are left out."""
    allowed = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        prefix, bar, reason = (part.strip() for part in line.partition("|"))
        if not (prefix and bar and reason):
            raise ValueError(f"a line of the skip list must read 'test id prefix | reason', got: {line!r}")
        allowed.append(AllowedSkip(prefix, reason))
    return allowed


def unexpected_skips(skipped: Iterable[tuple[str, str]], allowed: Iterable[AllowedSkip]) -> list[tuple[str, str]]:
    """Those (test id, reason) that no line of the skip list covers."""
    known = list(allowed)
    return [
        (name, reason)
        for name, reason in skipped
        if not any(name.startswith(skip.prefix) and skip.reason in reason for skip in known)
    ]
