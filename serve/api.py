"""The HTTP app, over any backend that segments one image. Nothing of Ray: a test runs it in its own process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sceneray import __version__
from serve.guard import Gatekeeper, guard_of
from serve.key_watch import KeyWatch
from serve.middleware import DEADLINE_HEADER, ContextSettings, RequestContext
from serve.quotas import Quotas
from serve.routes import docs, errors, health, model, oip, page, segment
from serve.site import ApiSettings, Backend, Site
from serve.telemetry import Telemetry

__all__ = ["ApiSettings", "Backend", "create_app"]

# What pages of the named origins may do. No cookies: a key is sent by the page itself, or not at all.
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "X-API-Key", "x-request-id", DEADLINE_HEADER],
    "expose_headers": ["Retry-After", "Server-Timing", "x-request-id", "x-model-name", "x-model-version"],
}


def create_app(
    backend: Backend, settings: ApiSettings, quotas: Quotas | None = None, telemetry: Telemetry | None = None
) -> FastAPI:
    """The FastAPI app. Built where it runs, so that it is never pickled.

    `quotas`: shared by all ingress replicas; None: those of this process alone. Raises ConfigError for a key file that
    cannot be used.
    """
    keys = KeyWatch(settings.key_digests, settings.keys_file)
    site = Site(backend, settings, guard_of(keys), quotas)
    app = FastAPI(
        title="sceneray",
        version=__version__,
        description="Scene parsing: a photograph in, the class of every pixel out.",
        docs_url=None,  # the default page loads its scripts from a CDN; ours are served from here
        redoc_url=None,
        lifespan=_watching(keys),
    )
    # The last one added is the outermost.
    app.add_middleware(Gatekeeper, routes=app.router.routes, guard=site.guard, keys=keys, quotas=site.quotas)
    context = ContextSettings(settings.deadline_s, settings.max_bytes_in_work, settings.proxied, settings.access_log)
    app.add_middleware(RequestContext, settings=context, telemetry=telemetry)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), **CORS)
    errors.add(app)
    docs.add(app)
    page.add(app)
    for part in (health, segment, model, oip):
        part.add(app, site)
    return app


def _watching(keys: KeyWatch) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs beside the app while it is up: the look at the key file."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(keys.run())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    return lifespan
