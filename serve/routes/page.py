"""`/`: the page for people, its files, and a drawn scene for those who have no photograph at hand."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from importlib import resources

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from sceneray.data import town
from sceneray.data.images import encode_jpeg

INDEX = "index.html"
# What is served, and nothing else: a name in a URL is looked up here and opens no file.
MEDIA_TYPES = {
    INDEX: "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "mask.js": "text/javascript",
    "facts.js": "text/javascript",
    "probe.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# The page runs its own files and talks to its own server, and nobody's else, whatever came into it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and answered 304: a new version is seen at once
}
# A scene that no store contains, with every class of the town in it.
SAMPLE_SEED = town.scene_seed(0, "held_out", 17)
SAMPLE_SIZE = (384, 512)  # height, width
SAMPLE_QUALITY = 92


def add(app: FastAPI) -> None:
    """`/`, `/page/...` and `/page/sample.jpg`. None asks for a key: the page asks people for theirs."""
    folder = resources.files("serve") / "page"
    files = {name: (folder / name).read_bytes() for name in MEDIA_TYPES}
    sample = drawn_once()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file(request, files[INDEX], MEDIA_TYPES[INDEX])

    @app.get("/page/sample.jpg", include_in_schema=False)
    async def sample_photo(request: Request) -> Response:
        return _file(request, await asyncio.to_thread(sample), "image/jpeg")

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file.")
        return _file(request, files[name], MEDIA_TYPES[name])


def drawn_once() -> Callable[[], bytes]:
    """A function that gives the sample as a JPEG: the first call draws it, those beside it wait for that drawing."""
    lock = threading.Lock()
    drawn: list[bytes] = []

    def sample() -> bytes:
        with lock:
            if not drawn:
                photo, _ = town.draw(SAMPLE_SEED, *SAMPLE_SIZE)
                drawn.append(encode_jpeg(photo, SAMPLE_QUALITY))
        return drawn[0]

    return sample


def _file(request: Request, content: bytes, media_type: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
