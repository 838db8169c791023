"""What wraps every request, whatever its route: a name, a deadline, an end when the caller hangs up, a log line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import access_log
from serve.admission import BodyGate, Refused
from serve.routes.errors import answer, broken
from serve.telemetry import Silent, Telemetry, request_ended
from serve.visit import Visit, clean_request_id, enter

log = logging.getLogger("sceneray.serve")

DEADLINE_HEADER = "x-request-timeout-s"
# A browser guesses no types, shows nothing of ours in a frame, and runs only what this server sends.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
# So much of a refused body is still read, so that the connection can be used again.
READ_ON_BYTES = 256 * 1024
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ContextSettings:
    """`deadline_s`: the longest a request may take. `max_bytes`: of all bodies at a time. `proxied`: a proxy of Serve
    names requests and echoes the name."""

    deadline_s: float | None = None
    max_bytes: int = 256 * 2**20
    proxied: bool = False
    access_log: bool = True


class RequestContext:
    """Makes each request's Visit, ends it at its deadline or when nobody listens, and logs it.

    Serve's proxy gives each request an id and echoes it; without a proxy that is ours to do. `state.times` holds the
    seconds of the request's stages, and goes into the header Server-Timing.
    """

    def __init__(self, app: ASGIApp, settings: ContextSettings, telemetry: Telemetry | None = None) -> None:
        self._app = app
        self._settings = settings
        self._telemetry = telemetry or Silent()
        self._gate = BodyGate(settings.max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(clean_request_id(given))
        enter(visit)
        scope.setdefault("state", {}).update(visit=visit, request_id=visit.request_id, times=visit.times)
        echoed = self._settings.proxied and bool(given)
        names = {} if echoed else {"x-request-id": visit.request_id}
        exchange = _Exchange(visit, receive, send, names, self._gate)
        exchange.expects(headers)
        try:
            seconds = timeout_of(headers, self._settings.deadline_s)
            await self._within(seconds, scope, exchange)
        except Refused as error:
            await answer(visit, error)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # a proxy before us calls off what nobody waits for
            exchange.gone = True
            raise
        except Exception as error:  # whatever it is: the log is told, the caller is not
            log.error("request %s failed", visit.request_id, exc_info=error)
            if exchange.status is not None:
                raise
            await answer(visit, broken())(scope, exchange.receive, exchange.send)
        finally:
            self._gate.give(exchange.held)
            self._log(scope, exchange)

    async def _within(self, seconds: float | None, scope: Scope, exchange: _Exchange) -> None:
        """Run the app until it has answered, the time is over, or the caller has hung up."""
        visit = exchange.visit
        visit.deadline = None if seconds is None else time.time() + seconds
        try:
            async with asyncio.timeout(seconds) as limit, exchange.watched(limit):
                await self._app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            # Another TimeoutError of the app's own is none of ours.
            if exchange.gone:
                return
            if not limit.expired():
                raise
            if exchange.status is None:
                raise _too_late(seconds or 0.0) from None

    def _log(self, scope: Scope, exchange: _Exchange) -> None:
        visit, status = exchange.visit, exchange.status
        if exchange.gone and status is None:
            status, visit.error_type = access_log.CLIENT_GONE, "client_gone"
        # Without any answer the server behind us makes it a 500.
        status = status or 500
        if self._settings.access_log:
            access_log.write(scope, visit, status, exchange.headers, exchange.seconds)
        route = access_log.path_template(scope)
        request_ended(self._telemetry, route, status, visit.error_type, exchange.seconds, visit.times)


class _Exchange:
    """One request's `receive` and `send`: counted, named, and listening for the caller to hang up."""

    def __init__(self, visit: Visit, receive: Receive, send: Send, names: Mapping[str, str], gate: BodyGate) -> None:
        self.visit = visit
        self.held = 0  # bytes taken from the gate
        self._gate = gate
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self.gone = False
        self._receive = receive
        self._send = send
        self._names = names
        self._to_come = 0.0  # bytes of body that are still on their way
        self._is_whole = False  # the body came to its end
        self._started_at = time.perf_counter()
        self._limit: asyncio.Timeout | None = None
        self._listener: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return time.perf_counter() - self._started_at

    def expects(self, headers: Headers) -> None:
        """Note how large the body will be: what was declared, without end where it comes in chunks."""
        declared = headers.get("content-length", "0")
        is_chunked = "transfer-encoding" in headers
        self._to_come = float(declared) if declared.isdecimal() and not is_chunked else float("inf")

    @contextlib.asynccontextmanager
    async def watched(self, limit: asyncio.Timeout) -> AsyncIterator[None]:
        """While it lasts, a caller who hangs up after sending everything ends `limit` at once."""
        self._limit = limit
        try:
            yield
        finally:
            # A cancelled task keeps its traceback, that the frame, and that this exchange. Kept here too, it would be a
            # cycle for each request; to collect them stops the process for tenths of a second in a flood (measured).
            listener, self._listener, self._limit = self._listener, None, None
            if listener is not None:
                listener.cancel()
                await asyncio.wait([listener])
                if not listener.cancelled() and (error := listener.exception()) is not None:
                    log.warning("request %s: the connection failed: %r", self.visit.request_id, error)

    async def receive(self) -> Message:
        """The next part of the body; after the last, only ever the news that the caller is gone."""
        if self._is_whole:
            if self._listener is not None:
                await asyncio.shield(self._listener)
            return {"type": "http.disconnect"}
        message = await self._receive()
        size = len(message.get("body", b""))
        self.visit.bytes_in += size
        self._to_come -= size
        self._gate.take(size)
        self.held += size
        if message["type"] == "http.disconnect":
            self.gone = True
        elif not message.get("more_body", False):
            self._is_whole = True
            self._listener = asyncio.ensure_future(self._listen())
        return message

    async def send(self, message: Message) -> None:
        """Part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = self._dress(MutableHeaders(scope=message))
        self.visit.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        # An answer under way may well be why the connection ends; who asked for it is then not gone.
        if self.status is None:
            self.gone = True
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time())

    def _dress(self, headers: MutableHeaders) -> Mapping[str, str]:
        is_page = headers.get("content-type", "").startswith("text/html")
        policy = {"Content-Security-Policy": PAGE_POLICY if is_page else DATA_POLICY}
        for name, value in {**SECURITY_HEADERS, **policy}.items():
            headers.setdefault(name, value)  # a route may be stricter
        headers.update(self._names)
        if not self._is_whole and self._to_come > READ_ON_BYTES:
            headers["Connection"] = "close"  # kept open, the server would read and drop the whole of it
        headers["Server-Timing"] = server_timing({**self.visit.times, "total": self.seconds})
        return headers


def timeout_of(headers: Headers, most: float | None) -> float | None:
    """Seconds that this request may take: what its header asks for, at most `most`. Raises Refused for no number."""
    asked = headers.get(DEADLINE_HEADER)
    if asked is None:
        return most
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise Refused(
            422, "invalid_parameter", f"{DEADLINE_HEADER} takes a number of seconds above 0: send 10 for ten seconds."
        )
    return seconds if most is None else min(seconds, most)


def server_timing(times: Mapping[str, float]) -> str:
    """Seconds by stage as the header Server-Timing, in milliseconds (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in times.items())


def _too_late(seconds: float) -> Refused:
    return Refused(
        504,
        "deadline_exceeded",
        f"the answer was not ready in {seconds:g} s: try again later, or send a smaller image.",
        detail={"timeout_s": seconds},
    )
