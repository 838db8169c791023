"""For the tests of the endpoint: a client that needs no network, and uploads, sound ones and bombs."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from typing import Any

import anyio
import httpx
from fastapi import FastAPI
from PIL import Image

# anyio imports this on first use. In the depth of a request pytest's rewriting of the module fails on CPython 3.11
# ("AST constructor recursion depth mismatch"), so it is loaded here.
anyio.open_file  # noqa: B018


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """`image` as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing: a few bytes that ask for gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class Client:
    """Requests to an ASGI app in this process, one after another on one event loop."""

    def __init__(self, app: FastAPI) -> None:
        # The app's own errors become its 500 answers, as behind a real server.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://endpoint")
        self._runner = asyncio.Runner()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, and its whole answer."""
        return self._runner.run(self._client.request(method, path, **options))

    def get(self, path: str) -> httpx.Response:
        """One GET."""
        return self.request("GET", path)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """One POST."""
        return self.request("POST", path, **options)
