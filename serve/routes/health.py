"""Whether the server runs and whether its model answers: the paths of the Open Inference Protocol, and Kubernetes'."""

from __future__ import annotations

import asyncio
import logging

from fastapi import FastAPI

from serve.admission import Refused
from serve.schemas import ErrorBody
from serve.site import Site

log = logging.getLogger("sceneray.serve")

READY_TIMEOUT_S = 5.0


def add(app: FastAPI, site: Site) -> None:
    """Liveness and readiness, which never ask for a key."""

    @app.get("/v2/health/live", summary="The server runs", tags=["health"])
    @app.get("/livez", include_in_schema=False)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="The model answers", tags=["health"], responses={503: {"model": ErrorBody}})
    @app.get("/readyz", include_in_schema=False)
    async def ready() -> dict[str, bool]:
        try:
            await asyncio.wait_for(site.backend.describe(), READY_TIMEOUT_S)
        except Exception as error:  # whatever keeps the model from answering: not ready
            log.warning("not ready: %s", error)
            raise Refused(503, "not_ready", "the model does not answer yet.", {"Retry-After": "1"}) from error
        return {"ready": True}
