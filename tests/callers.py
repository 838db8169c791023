"""A steady load on an endpoint that the bundle of `tests.bundles` answers, and the processes that answer it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import httpx
import numpy as np
import psutil
from PIL import Image

from sceneray.data.images import decode_label
from tests.bundles import agree, half_bright
from tests.support import POLL_S
from tests.unit.serve.uploads import encoded

IMAGE, MASK = half_bright()
BODY = encoded(Image.fromarray(IMAGE), "PNG")
PATIENCE_S = 90.0
CALLERS = 4


class Load:
    """Callers who ask one after the other until the context ends; what they were answered."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self._headers = {"Content-Type": "image/png"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.statuses: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.wrong = 0
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for(CALLERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def wait_for(self, more: int) -> None:
        """Until `more` good answers than now are there."""
        wanted, deadline = self.statuses["200"] + more, time.monotonic() + PATIENCE_S
        while self.statuses["200"] < wanted:
            assert time.monotonic() < deadline, dict(self.statuses)
            time.sleep(POLL_S)

    def wait_for_version(self, version: str) -> None:
        """Until `version` answers."""
        seen, deadline = self.versions[version], time.monotonic() + PATIENCE_S
        while self.versions[version] < seen + CALLERS:
            assert time.monotonic() < deadline, dict(self.versions)
            time.sleep(POLL_S)

    @property
    def failed(self) -> dict[str, int]:
        """How often each answer came that was none."""
        return {status: count for status, count in self.statuses.items() if status != "200"}

    def _call(self) -> None:
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client:
            while not self._ended.is_set():
                started_at = time.monotonic()
                version, right = "", True
                try:
                    answer = client.post("/v1/segment", content=BODY, headers=self._headers)
                    status = str(answer.status_code)
                    if status == "200":
                        version = answer.headers["x-model-version"]
                        right = agree(np.asarray(decode_label(answer.content)), MASK)
                except httpx.TransportError as error:
                    status = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.statuses[status] += 1
                    self.versions[version] += bool(version)
                    self.wrong += not right
                    self.longest_s = max(self.longest_s, time.monotonic() - started_at)


def below(word: str) -> list[psutil.Process]:
    """The processes below this one whose command line has `word`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas below this one."""
    return below(f"ServeReplica:sceneray:{deployment}")


def wait_for_replicas(deployment: str, count: int, but: int | None = None) -> None:
    """Until `count` replicas run, the killed one not among them."""
    deadline = time.monotonic() + PATIENCE_S
    while len([process for process in replicas(deployment) if process.pid != but]) < count:
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
