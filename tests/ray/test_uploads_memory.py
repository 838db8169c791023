"""What fifty uploads of 100 MB at once leave in the memory of Serve's proxy and of the HTTP replica."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.serve import serving
from tests.bundles import write_bundle
from tests.callers import below
from tests.unit.serve.uploads import encoded

pytestmark = pytest.mark.chaos

CLIENTS = 50
BODY_BYTES = 100 * 10**6
CHUNK = bytes(50_000)
HELD = 16  # images that wait for a batch meanwhile
MANY_HELD = 210  # more than a model replica takes by Serve's count and than may wait before it
WAIT_MS = 45_000  # each for so long
SEEN_S = 5.0  # the longest that a pair of images is waited for, which shows that those before it were seen
PATIENCE_S = 120.0
# A declared body is refused once the HTTP replica has seen its header. Serve's proxy reads on meanwhile, without any
# brake: for each upload what comes in over loopback in that time, here up to 10 MB; the replica fetches little of it.
DECLARED_MIB = {"proxy": 512, "ingress": 128}
# Of a chunked body 20 MiB (max_bytes) must come before it is too large, and all bodies together may have 256 MiB
# (max_bytes_in_work) before one more byte is refused. Serve's queues, which have no brake, hold beside that what comes
# in while the replica reads.
CHUNKED_MIB = dict.fromkeys(("proxy", "ingress"), 6 * 256)
PARTS = {"proxy": "ray::ProxyActor", "ingress": "ServeReplica:sceneray:Ingress"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint whose images wait long for others of their shape."""
    bundle = write_bundle(str(tmp_path_factory.mktemp("serve") / "bundle"))
    with serving(bundle, mode="fast", max_batch_size=2, batch_wait_ms=WAIT_MS, deadline_s=300, access_log=False) as url:
        yield url


class Watch:
    """The most resident memory that each part had while the context lasts, above what it had before, in MiB."""

    def __init__(self) -> None:
        self.processes = {part: below(word)[0] for part, word in PARTS.items()}
        self.before = {part: process.memory_info().rss for part, process in self.processes.items()}
        self.most = dict(self.before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def growth(self) -> dict[str, int]:
        """MiB above the start, by part."""
        return {part: (self.most[part] - self.before[part]) // 2**20 for part in PARTS}

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            for part, process in self.processes.items():
                self.most[part] = max(self.most[part], process.memory_info().rss)


@contextlib.asynccontextmanager
async def held(url: str, count: int) -> AsyncIterator[None]:
    """So many images, each of a shape of its own, that wait for a batch in the model replica or before it."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
        asked = [asyncio.create_task(client.post("/v1/segment", content=image(32 + n))) for n in range(count)]
        # Two of one shape are a full batch and answered or refused at once, unless every slot is taken.
        pair = [asyncio.create_task(client.post("/v1/segment", content=image(31))) for _ in range(2)]
        await asyncio.wait(pair, timeout=SEEN_S)
        try:
            assert sum(not task.done() for task in asked) >= HELD
            yield
        finally:
            for task in [*asked, *pair]:
                task.cancel()
            await asyncio.gather(*asked, *pair, return_exceptions=True)


def image(width: int) -> bytes:
    """A black PNG."""
    return encoded(Image.fromarray(np.zeros((32, width, 3), np.uint8)), "PNG")


async def upload(url: str, chunked: bool) -> tuple[str, int]:
    """Send BODY_BYTES of zeros until there is an answer: its status, and how many bytes were sent."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {BODY_BYTES}"
    writer.write(f"POST /v1/segment HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\n{size}\r\n\r\n".encode())
    answer = asyncio.create_task(reader.readline())
    piece = b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK) if chunked else CHUNK
    assert BODY_BYTES % len(CHUNK) == 0
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < BODY_BYTES and not answer.done():
            writer.write(piece)
            await writer.drain()
            sent += len(CHUNK)
            await asyncio.sleep(0)
        if chunked and not answer.done():
            writer.write(b"0\r\n\r\n")
    try:
        status = (await asyncio.wait_for(answer, PATIENCE_S)).decode().split()[1:2] or ["closed"]
    except (ConnectionError, TimeoutError) as error:
        status = [type(error).__name__]
    writer.transport.abort()
    return status[0], sent


async def uploads(url: str, chunked: bool, count: int) -> tuple[Counter[str], int, dict[str, int], float]:
    """Statuses of CLIENTS uploads at once beside `count` held images, bytes sent in all, memory growth, seconds."""
    async with held(url, count):
        with Watch() as watch:
            started_at = time.monotonic()
            done = await asyncio.gather(*(upload(url, chunked) for _ in range(CLIENTS)))
            took = time.monotonic() - started_at
    return Counter(status for status, _ in done), sum(sent for _, sent in done), watch.growth, took


@pytest.mark.parametrize("count", [HELD, MANY_HELD])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_fifty_large_uploads_leave_the_memory_bounded(url: str, chunked: bool, count: int) -> None:
    """All are refused beside busy slots, and neither process grows by more than its bound."""
    statuses, sent, growth, took = asyncio.run(uploads(url, chunked, count))
    print(
        f"\nchunked={chunked} held={count}: {dict(statuses)}, sent {sent / 1e6:.0f} MB in {took:.1f} s, MiB: {growth}"
    )
    # Too large, or too much beside the others.
    assert set(statuses) <= ({"413", "429"} if chunked else {"413"})
    assert statuses.total() == CLIENTS
    assert sent < CLIENTS * BODY_BYTES
    most = CHUNKED_MIB if chunked else DECLARED_MIB
    assert all(growth[part] <= most[part] for part in PARTS), growth
