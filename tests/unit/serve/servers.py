"""For the tests of the endpoint: a real HTTP server around an app, and backends whose behaviour a test decides."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from sceneray.masks import Photo
from serve.batching import Overloaded
from serve.schemas import Ask, ModelCard, Segmented
from tests.bundles import CLASSES
from tests.support import POLL_S

CARD = ModelCard("still", "1", "0" * 64, CLASSES)


class Still:
    """A backend that answers every image with class 0, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []

    async def segment(self, image: Photo, ask: Ask) -> Segmented:
        """The mask of zeros."""
        self.asked.append(ask)
        return Segmented(np.zeros(image.shape[:2], np.uint8), CARD, 1)

    async def describe(self) -> dict[str, Any]:
        """Enough for /readyz."""
        return {"name": CARD.name, "version": CARD.version, "digest": CARD.digest}


class Busy(Still):
    """A backend whose queue is full."""

    async def segment(self, image: Photo, ask: Ask) -> Segmented:  # noqa: ARG002
        """Refuses."""
        raise Overloaded("the queue is full.")


class Endless(Still):
    """A backend that never answers, and tells when it was called off."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.cancelled = threading.Event()

    async def segment(self, image: Photo, ask: Ask) -> Segmented:  # noqa: ARG002
        """Waits until it is cancelled."""
        self.asked.append(ask)
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError("nobody sets that event")


@contextlib.contextmanager
def uvicorn_of(app: FastAPI) -> Iterator[int]:
    """A uvicorn with `app` on a free port of this machine, in a thread; yields the port."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(POLL_S / 10)
