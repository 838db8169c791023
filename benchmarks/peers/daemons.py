"""How much of the machine Ray's own processes take while something else is timed."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from types import TracebackType

import psutil

from sceneray.devices import usable_cores

LOOK_EVERY_S = 2.0  # one look costs some milliseconds of a core


def group_of(name: str, command: str) -> str | None:
    """Which part of Ray a process belongs to; None for one that trains (a worker, its loader, a peer's loop).

    `name` is the process's own, `command` its command line in one string.
    """
    for part in ("raylet", "gcs_server"):
        if name.startswith(part):
            return part
    # Before loaders: the dashboard's modules are forks of a Python server of processes, as a loader's processes are.
    if any(mark in command.lower() for mark in ("dashboard", "agent", "log_monitor", "monitor.py")):
        return "dashboard and agents"
    if any(mark in command for mark in ("TrainWorker", "multiprocessing", "benchmarks.peers")):
        return None
    if command.startswith("ray::IDLE") or "default_worker.py" in command:
        return "idle workers"
    if command.startswith("ray::"):
        # An actor's title is its class, with the method it runs behind a dot.
        return "actor " + command.removeprefix("ray::").split(" ")[0].split(".")[0]
    return "other"


class DaemonWatch:
    """Adds up CPU seconds of Ray's processes below this one, by group, while its context lasts.

    Seconds of a process that ends between two looks are lost since the last look. This process counts as "driver".
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.times: list[float] = []
        self.seen: list[dict[str, float]] = []
        self._before: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="daemon-watch")

    def __enter__(self) -> DaemonWatch:
        self.look(first=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def share(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds of each group between two moments (wall clock) over the machine's core-seconds."""
        room = (end - start) * usable_cores()
        before, after = self._at(start), self._at(end)
        return {group: round((after[group] - before.get(group, 0.0)) / room, 4) for group in sorted(after)}

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.look()

    def look(self, first: bool = False) -> None:
        """Add what every process spent since the last look; `first`: what it spent before counts for nothing."""
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            try:
                with process.oneshot():
                    spent = process.cpu_times()
                    key = (process.pid, process.create_time())
                    group = (
                        "driver" if process.pid == here.pid else group_of(process.name(), " ".join(process.cmdline()))
                    )
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            seconds = spent.user + spent.system
            known = self._before.get(key, seconds if first else 0.0)
            self._before[key] = seconds
            if group is not None:
                self.totals[group] += seconds - known
        self.times.append(time.time())
        self.seen.append(dict(self.totals))

    def _at(self, moment: float) -> dict[str, float]:
        """Totals at a moment, between two looks in proportion to time."""
        after = min(bisect_left(self.times, moment), len(self.times) - 1)
        before = max(0, after - 1)
        length = self.times[after] - self.times[before]
        part = min(1.0, max(0.0, (moment - self.times[before]) / length)) if length else 1.0
        early, late = self.seen[before], self.seen[after]
        return {group: early.get(group, 0.0) + part * (late[group] - early.get(group, 0.0)) for group in late}
