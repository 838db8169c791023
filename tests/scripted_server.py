"""A real HTTP server on a free loopback port that answers each request as a script says, and may break off."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from tests.http_messages import Request, read_request

# What is done with one connection after its request has been read; it is closed then.
Step = Callable[[BinaryIO], None]


@dataclass
class Script:
    """The steps still to come, the last one again and again, and the requests that came, with the time of each."""

    url: str
    steps: list[Step]
    requests: list[Request] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # monotonic seconds
    lock: threading.Lock = field(default_factory=threading.Lock)


def says(status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> Step:
    """Answer with `status` and `body`; `retry_after="3"` is the header retry-after."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(content)}", "Connection: close"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in named.items()), "", ""])
    return lambda out: send(out, head.encode() + content)


def drops(out: BinaryIO) -> None:
    """Close the connection without a word."""


def breaks_off(out: BinaryIO) -> None:
    """Promise a body of 100 bytes and close after three."""
    send(out, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")


def drips(out: BinaryIO) -> None:
    """Send a body byte by byte, until the client has gone."""
    send(out, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while send(out, b"x"):
        time.sleep(0.02)


def send(out: BinaryIO, data: bytes) -> bool:
    """Send at once; False where the client has gone."""
    with contextlib.suppress(OSError):
        out.write(data)
        return True
    return False


@contextlib.contextmanager
def scripted(steps: Sequence[Step]) -> Iterator[Script]:
    """A server that follows `steps`, one a request."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = read_request(self.rfile, self.connection)
            if request is None:
                return
            with script.lock:
                script.requests.append(request)
                script.times.append(time.monotonic())
                step = script.steps.pop(0) if len(script.steps) > 1 else script.steps[0]
            step(self.wfile)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        script = Script(f"http://127.0.0.1:{server.server_address[1]}", list(steps))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
