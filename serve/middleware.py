"""What wraps every request, whatever its route: a name, and how long its stages took."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUEST_ID = 128


class RequestContext:
    """Names every request in `state.request_id`, and in the header x-request-id of its answer.

    Serve's proxy gives each request an id and echoes it; only without a proxy, and without an id from the caller, is
    it ours to do. `state.times` holds the seconds of the request's stages, and goes into the header Server-Timing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")[:MAX_REQUEST_ID]
        request_id = given or uuid.uuid4().hex
        times: dict[str, float] = {}
        scope.setdefault("state", {}).update(request_id=request_id, times=times)
        started_at = time.perf_counter()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if not given:
                    headers["x-request-id"] = request_id
                headers["Server-Timing"] = server_timing({**times, "total": time.perf_counter() - started_at})
            await send(message)

        await self._app(scope, receive, named)


def server_timing(times: Mapping[str, float]) -> str:
    """Seconds by stage as the header Server-Timing, in milliseconds (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in times.items())
