"""HTTP/1.1 messages read from a socket as far as a proxy must know them: the head, and where the body ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

PIECE = 1 << 16


@dataclass(frozen=True)
class Head:
    """The start line and the headers of a message; names in lower case."""

    start: str
    headers: Sequence[tuple[str, str]]

    def get(self, name: str) -> str:
        """The value of a header; empty where it is absent."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def encode(self) -> bytes:
        """The bytes to send."""
        return "".join([f"{self.start}\r\n", *(f"{k}: {v}\r\n" for k, v in self.headers), "\r\n"]).encode("latin-1")


@dataclass(frozen=True)
class Request:
    """One request of a client."""

    head: Head
    body: bytes  # as it came, with its chunk sizes where it is chunked

    @property
    def method(self) -> str:
        """GET, PUT, ..."""
        return self.head.start.split(" ")[0]

    @property
    def path(self) -> str:
        """/bucket/key?query, still percent-encoded."""
        return self.head.start.split(" ")[1]


def read_request(stream: BinaryIO, client: socket.socket) -> Request | None:
    head = read_head(stream)
    if head is None:
        return None
    if head.get("expect").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The body is sent along with the head, so the server is not asked; the header is no part of a signature.
        head = Head(head.start, [(key, value) for key, value in head.headers if key.lower() != "expect"])
    framed = bool(head.get("content-length") or head.get("transfer-encoding"))
    return Request(head, b"".join(read_body(head, stream, has_none=not framed)))


def read_head(stream: BinaryIO) -> Head | None:
    """The next head; None where the other side has ended the connection."""
    lines = []
    while (line := stream.readline()).strip():
        lines.append(line.decode("latin-1").rstrip("\r\n"))
    if not lines:
        return None
    if not line:
        raise EOFError("the connection ended within a head")
    pairs = (text.partition(":") for text in lines[1:])
    return Head(lines[0], [(key, value.strip()) for key, _, value in pairs])


def read_body(head: Head, stream: BinaryIO, has_none: bool) -> Iterator[bytes]:
    """The pieces of the body that follows `head`, as they come."""
    if has_none:
        return
    if "chunked" in head.get("transfer-encoding").lower():
        yield from _chunks(stream)
    elif length := head.get("content-length"):
        yield from _exactly(stream, int(length))
    else:
        while piece := stream.read(PIECE):
            yield piece


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while True:
        size_line = stream.readline()
        if not size_line.endswith(b"\n"):
            raise EOFError("the connection ended within a chunk's size")
        yield size_line
        size = int(size_line.split(b";")[0], 16)
        if size == 0:
            while (line := stream.readline()).strip():  # trailers
                yield line
            yield line
            return
        yield from _exactly(stream, size + 2)


def _exactly(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read(min(size, PIECE))
        if not piece:
            raise EOFError("the connection ended within a body")
        size -= len(piece)
        yield piece


def is_without_body(method: str, head: Head) -> bool:
    return method == "HEAD" or head.start.split(" ")[1] in ("204", "304")


def ends_with_connection(method: str, head: Head) -> bool:
    if head.get("connection").lower() == "close":
        return True
    framed = head.get("content-length") or head.get("transfer-encoding")
    return not framed and not is_without_body(method, head)
