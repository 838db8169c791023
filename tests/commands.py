"""`sceneray train` as a process of its own, for tests that kill, stop and watch it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sceneray import checkpoint, config, storage
from tests.support import ROOT

LIMIT_S = 240


class Command:
    """`sceneray train` as its own process."""

    def __init__(self, settings: config.TrainSettings, folder: Path, *arguments: str, **environment: str) -> None:
        self.result = folder / "result.json"
        file = folder / "settings.yaml"
        file.write_text(config.dump(settings))
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", str(file), "--json", str(self.result), *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}", **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Its exit code, once it ended."""
        return self.process.wait(timeout=LIMIT_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition while it runs."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"it ended early: {self.text()}"
            assert time.monotonic() < deadline, f"waited in vain: {self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def workers(self) -> list[int]:
        """Process ids of its training workers."""
        return [pid for pid in descendants(self.process.pid) if "RayTrainWorker" in command_line(pid)]


def command_line(pid: int) -> str:
    """The command line of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(root: int) -> list[int]:
    """Process ids of all children and their children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def same_bits(one: str, other: str) -> bool:
    """True where the final weights of two runs are equal bit for bit."""
    first, second = (checkpoint.load(storage.join(run, "last")).model for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
