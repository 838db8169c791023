"""Who may come in: the key and its rate, asked for before any of the body is read.

FastAPI reads a declared body before it calls a route's dependencies, so the check is an ASGI middleware. Which routes
ask for a key stands at the routes themselves: those that have `Site.guard` among their dependencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission import Refused
from serve.key_watch import KeyWatch
from serve.keys import Key
from serve.quotas import Quotas
from serve.visit import Visit


class Gatekeeper:
    """Answers with 401 or 429 whoever may not call a guarded route, and hands the others on with their key."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], guard: Sequence[Any], keys: KeyWatch, quotas: Quotas
    ) -> None:
        self._app = app
        self._routes = routes
        self._guard = guard
        self._keys = keys
        self._quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and not self._keys.ring.open:
            route = matched(self._routes, scope)
            if route is not None and is_guarded(route, self._guard):
                scope["route"] = route  # for the access log: who is refused here never reaches the router
                visit: Visit = scope["state"]["visit"]
                visit.key = self._known(Headers(scope=scope))
                await check_quota(self._quotas, visit.key, requests=1)
        await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> Key:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        presented = credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        key = self._keys.ring.find(presented)
        if key is None:
            raise unauthorized("this key is not known, or no longer" if presented else "no key came")
        return key


async def check_quota(quotas: Quotas, key: Key, pixels: int = 0, requests: int = 0) -> None:
    """Take from the key's quotas. Raises Refused: 429 where it must wait, 413 where it may never ask for so much."""
    if not key.allowances:
        return
    wait_s = await quotas.take(key, pixels, requests)
    if wait_s <= 0:
        return
    limits = {name: rule.burst for name, rule in key.allowances.items()}
    if math.isinf(wait_s):
        raise Refused(
            413,
            "above_quota",
            f"the key's quota never allows an image of {pixels} pixels: send it scaled down.",
            detail={"pixels": pixels, "at_once": limits},
        )
    seconds = math.ceil(wait_s)
    raise Refused(
        429,
        "rate_limited",
        f"the key's quota is used up: try again in {seconds} s.",
        {"Retry-After": str(seconds)},
        {"retry_after_s": round(wait_s, 3), "per_second": {name: rule.rate for name, rule in key.allowances.items()}},
    )


def unauthorized(why: str) -> Refused:
    """The 401 for a caller without a key that fits."""
    return Refused(
        401,
        "unauthorized",
        f"an API key is required and {why}: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
        {"WWW-Authenticate": "Bearer"},
    )


def matched(routes: Sequence[BaseRoute], scope: Scope) -> BaseRoute | None:
    """The route that will answer, as the router finds it; None where none fits path and method."""
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


def is_guarded(route: BaseRoute, guard: Sequence[Any]) -> bool:
    """True where the route asks for a key."""
    dependencies = getattr(route, "dependencies", None) or ()
    return any(dependency in guard for dependency in dependencies)


def guard_of(keys: KeyWatch) -> list[Any]:
    """The dependency that marks a route as guarded and writes both ways to send a key into OpenAPI.

    It checks again what the Gatekeeper did: a route that were matched in another way is refused, not opened.
    """

    async def check(  # async: FastAPI would run it in a thread
        request: Request,
        _bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        _header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        if not keys.ring.open and request.state.visit.key is None:
            raise unauthorized("none was checked")

    return [Depends(check)]
