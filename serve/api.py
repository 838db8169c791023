"""The HTTP app, over any backend that segments one image. Nothing of Ray: a test runs it in its own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from sceneray import __version__
from serve.admission import check_key
from serve.middleware import RequestContext
from serve.routes import docs, errors, health, model, segment
from serve.site import ApiSettings, Backend, Site

__all__ = ["ApiSettings", "Backend", "create_app"]


def create_app(backend: Backend, settings: ApiSettings) -> FastAPI:
    """The FastAPI app. Built where it runs, so that it is never pickled."""
    app = FastAPI(
        title="sceneray",
        version=__version__,
        description="Scene parsing: a photograph in, the class of every pixel out.",
        docs_url=None,  # the default page loads its scripts from a CDN; ours are served from here
        redoc_url=None,
    )
    app.add_middleware(RequestContext)
    site = Site(backend, settings, guard=[Depends(_key_check(settings.key_digests))])
    errors.add(app)
    docs.add(app)
    for part in (health, segment, model):
        part.add(app, site)
    return app


def _key_check(digests: Sequence[str]) -> Callable[..., None]:
    def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        check_key(bearer.credentials if bearer else header, digests)

    return check
