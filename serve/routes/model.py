"""Which model is served."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.schemas import ModelBody
from serve.site import Site


def add(app: FastAPI, site: Site) -> None:
    """`/v1/model`."""

    @app.get("/v1/model", summary="The bundle that is served", dependencies=site.guard, response_model=ModelBody)
    async def model() -> dict[str, Any]:
        """Classes, colours, name, version, digest, input rule, and the metrics measured before export."""
        about = await site.backend.describe()
        return {**about, "metrics": about.get("metrics", {})}
