"""The proxy that store tests let fail: as long as nothing is to fail, it changes nothing."""

from __future__ import annotations

import hashlib
import random
import socket

import pytest

from sceneray import storage
from sceneray.errors import ConflictError
from tests.fault_proxy import FaultProxy
from tests.saving import PATIENCE_S

MIB = 2**20


def test_the_proxy_changes_nothing(proxy: FaultProxy, root: str) -> None:
    """Without faults every request has the server's own answer, with odd names and with 60 MiB."""
    big = random.Random(0).randbytes(60 * MIB)
    name = storage.join(root, "a b", "ä+%.bin")
    storage.write_bytes(name, big)
    assert hashlib.sha256(storage.read_bytes(name)).digest() == hashlib.sha256(big).digest()
    fs, path = storage.filesystem(storage.join(root, "parts"))
    fs.pipe_file(path, big, chunksize=8 * MIB)  # 8 MiB a part: a multi-part upload
    assert fs.cat_file(path, start=8 * MIB - 5, end=8 * MIB + 5) == big[8 * MIB - 5 : 8 * MIB + 5]
    assert storage.walk_files(root) == [("a b/ä+%.bin", len(big)), ("parts", len(big))]
    storage.write_bytes(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""
    tag = storage.etag(name)
    assert tag is not None
    with pytest.raises(ConflictError):
        storage.create(name, b"x")
    storage.compare_and_swap(name, tag, b"x")
    storage.remove(root)
    assert storage.walk_files(root) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(name)
    assert proxy.requests > 20
    assert proxy.counts == {}


def test_the_proxy_speaks_plain_http(proxy: FaultProxy) -> None:
    """Chunked bodies, a body that waits for "100 Continue" and several requests on one connection get their answers."""
    port = int(proxy.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client, client.makefile("rb") as answers:
        for body in (
            b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
            b"Content-Length: 3\r\n\r\nabc",
            b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n",
        ):
            client.sendall(b"PUT /none/x HTTP/1.1\r\nHost: x\r\n" + body)
            status = answers.readline()
            if b"Expect" in body:
                assert status == b"HTTP/1.1 100 Continue\r\n"
                assert answers.readline() == b"\r\n"
                client.sendall(b"abc")
                status = answers.readline()
            assert status.startswith(b"HTTP/1.1 403")  # the server's own answer: nobody has signed this
            length = 0
            while (line := answers.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert length
            assert b"<Error>" in answers.read(length)
    assert proxy.requests == 3
