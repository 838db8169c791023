"""An HTTP proxy in front of a real S3 server that answers wrongly, late or not at all, as it is told.

It forwards bytes as they come: signatures (AWS SigV4 signs the Host header) and chunked bodies stay valid. A client
connection carries any number of requests; each goes to the server over a connection of its own.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import urlsplit

import pytest
import s3fs

from tests.http_messages import (
    Head,
    Request,
    ends_with_connection,
    is_without_body,
    read_body,
    read_head,
    read_request,
)
from tests.saving import PATIENCE_S

# What may go wrong. "lost": the server did it, and the answer never comes. "cut": half of the answer comes.
KINDS = ("500", "503", "reset", "lost", "cut", "delay")
ERRORS = {"500": ("Internal Server Error", "InternalError"), "503": ("Service Unavailable", "SlowDown")}


@dataclass
class Hold:
    """Requests that are kept back. `arrived`: the first is here. Once `released` all go on; with `drop` none does."""

    predicate: Callable[[Request], bool]
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    drop: bool = False


class _Gone(Exception):
    """This connection is to end with a reset."""


class FaultProxy:
    """A proxy on a free loopback port before the server at `upstream`; a context manager.

    `share` of the requests meet one of `kinds`, drawn from `seed`; `counts` says how many of each did.
    """

    def __init__(self, upstream: str, seed: int = 0, share: float = 0.0, kinds: Sequence[str] = KINDS) -> None:
        url = urlsplit(upstream)
        assert url.hostname is not None
        assert url.port is not None
        self.upstream = (url.hostname, url.port)
        self.share = share
        self.kinds = kinds
        self.delay_s = 0.05
        self.counts: Counter[str] = Counter()
        self.requests = 0
        # (predicate, kind) of single faults; each is taken by the first request that fits.
        self.planned: list[tuple[Callable[[Request], bool], str]] = []
        self._holds: list[Hold] = []
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL has to be."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        for hold in list(self._holds):
            hold.released.set()
        self.go_away()

    def come_back(self) -> None:
        """Take connections."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True, name="fault-proxy").start()

    def go_away(self) -> None:
        """Refuse connections, and reset those there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _reset(connection)

    @contextlib.contextmanager
    def hold(self, predicate: Callable[[Request], bool]) -> Iterator[Hold]:
        """Keep back requests that fit, until released or until the context ends."""
        hold = Hold(predicate)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.released.set()

    def plan(self, kind: str, predicate: Callable[[Request], bool]) -> None:
        """Let the next request that fits meet this fault."""
        with self._lock:
            self.planned.append((predicate, kind))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="fault-proxy").start()

    def _serve(self, client: socket.socket) -> None:
        """Answer the requests of one connection until either side ends it."""
        try:
            with client, client.makefile("rb") as stream:
                try:
                    while (request := read_request(stream, client)) is not None:
                        self._answer(request, client)
                except (_Gone, EOFError):
                    _reset(client)
        except OSError:
            return  # the client has gone, or go_away() closed it
        finally:
            with self._lock:
                self._connections.discard(client)

    def _answer(self, request: Request, client: socket.socket) -> None:
        fault = self._draw(request)
        for hold in list(self._holds):
            if hold.predicate(request):
                hold.arrived.set()
                assert hold.released.wait(PATIENCE_S), "nobody released a held request"
                if hold.drop:
                    raise _Gone
        if fault in ERRORS:
            client.sendall(_error_answer(fault, request.method))
            return
        if fault == "reset":
            raise _Gone
        if fault == "delay":
            time.sleep(self.delay_s)
        self._forward(request, client, fault)

    def _draw(self, request: Request) -> str | None:
        with self._lock:
            self.requests += 1
            fault = None
            for number, (predicate, kind) in enumerate(self.planned):
                if predicate(request):
                    fault = kind
                    del self.planned[number]
                    break
            else:
                if self._chance.random() < self.share:
                    fault = self._chance.choice(list(self.kinds))
            if fault is not None:
                self.counts[fault] += 1
        return fault

    def _forward(self, request: Request, client: socket.socket, fault: str | None) -> None:
        try:
            with socket.create_connection(self.upstream, timeout=PATIENCE_S) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(request.head.encode() + request.body)
                with server.makefile("rb") as stream:
                    head = read_head(stream)
                    while head is not None and head.start.split(" ")[1].startswith("1"):
                        head = read_head(stream)
                    if head is None:
                        raise _Gone
                    self._relay(request, head, stream, client, fault)
        except ConnectionError as error:
            raise _Gone from error

    def _relay(self, request: Request, head: Head, stream: BinaryIO, client: socket.socket, fault: str | None) -> None:
        """Pass an answer on as it comes, or as much of it as `fault` lets through."""
        pieces = read_body(head, stream, has_none=is_without_body(request.method, head))
        if fault == "lost":
            for _ in pieces:
                pass
            raise _Gone
        if fault == "cut":
            answer = head.encode() + b"".join(pieces)
            client.sendall(answer[: -1 - (len(answer) - len(head.encode())) // 2])
            client.shutdown(socket.SHUT_WR)  # what was sent arrives before the end does
            raise _Gone
        client.sendall(head.encode())
        for piece in pieces:
            client.sendall(piece)
        if ends_with_connection(request.method, head):
            raise EOFError


def _error_answer(kind: str, method: str) -> bytes:
    reason, code = ERRORS[kind]
    body = f"<Error><Code>{code}</Code><Message>the test says so</Message></Error>".encode()
    head = f"HTTP/1.1 {kind} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if method == "HEAD" else head + body


def _reset(connection: socket.socket) -> None:
    """End a connection so that the other side sees a reset, at once."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


@contextlib.contextmanager
def at_endpoint(endpoint: str, **environment: str) -> Iterator[None]:
    """s3:// URLs of this process lead to `endpoint`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
