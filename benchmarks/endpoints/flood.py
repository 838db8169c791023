"""A load generator for far more requests than are answered: light, and with refusals written down as answers are.

    python -m benchmarks.endpoints.flood URL PHOTOS closed CALLERS SECONDS
    python -m benchmarks.endpoints.flood URL PHOTOS open RATE SECONDS
    python -m benchmarks.endpoints.flood URL PHOTOS quiet WITHIN SECONDS

`closed`: so many callers, each of which asks again as soon as it was answered or refused. `open`: Poisson arrivals
whatever the server does; a latency counts from the moment that its request was due, so waiting for one of the
CONNECTIONS is charged to the server, and so is a generator that cannot keep up: `late_p99` says how far it lagged.
`quiet`: one caller, until an answer comes within WITHIN seconds; `took` is how long that took, `quiet` whether it did.

Photographs are sent as raw bodies, which costs both sides less than a form. When the last request of `open` was sent,
a line `sent` comes on stdout; when all is answered, one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from benchmarks.endpoints.load import arrivals, quantile
from benchmarks.endpoints.work import read_photos

CONNECTIONS = 1000
TIMEOUT_S = 120.0
REFUSED = (429, 503)
HEADERS = {"Content-Type": "image/jpeg"}
PAUSE_S = 0.02  # of a caller whose connection failed: it does not spin


@dataclass
class Tally:
    """What came back. Moments in seconds since the start, latencies in seconds."""

    answered: list[tuple[float, float]] = field(default_factory=list)  # (moment, latency) of each 200
    refused: list[tuple[float, float]] = field(default_factory=list)  # likewise of each 429 and 503
    inside: list[float] = field(default_factory=list)  # of refusals: seconds in the HTTP replica, by Server-Timing
    late: list[float] = field(default_factory=list)  # how long after it was due each request was begun
    statuses: Counter[str] = field(default_factory=Counter)


class Flood:
    """Callers of one endpoint."""

    def __init__(self, url: str, photos: list[bytes], session: aiohttp.ClientSession) -> None:
        self.url = f"{url}/v1/segment"
        self.photos = photos
        self.session = session
        self.tally = Tally()
        self.started_at = time.perf_counter()

    async def ask(self, number: int, due: float) -> int:
        """Send photograph `number`; the status, 0 where the connection failed. The latency counts from `due`."""
        self.tally.late.append(time.perf_counter() - due)
        body = self.photos[number % len(self.photos)]
        try:
            async with self.session.post(self.url, data=body, headers=HEADERS) as answer:
                await answer.read()
                status, headers = answer.status, answer.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.tally.statuses[type(error).__name__] += 1
            return 0
        now = time.perf_counter()
        came = (now - self.started_at, now - due)
        if status == 200:
            self.tally.answered.append(came)
        elif status in REFUSED:
            self.tally.refused.append(came)
            if (inside := total_s(headers.get("Server-Timing", ""))) is not None:
                self.tally.inside.append(inside)
        # Serve's proxy refuses in plain text; what the routes refuse is JSON.
        from_proxy = status != 200 and not headers.get("Content-Type", "").startswith("application/json")
        self.tally.statuses[f"{status} by the proxy" if from_proxy else str(status)] += 1
        return status

    async def closed(self, callers: float, seconds: float) -> None:
        """Each caller asks again once it was answered or refused."""
        numbers, until = iter(range(10**9)), self.started_at + seconds

        async def call() -> None:
            while time.perf_counter() < until:
                if not await self.ask(next(numbers), time.perf_counter()):
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(call() for _ in range(int(callers))))

    async def open(self, rate: float, seconds: float) -> None:
        """Requests at random moments, `rate` a second."""
        tasks = set()
        async for arrival in arrivals(rate, seconds):
            tasks.add(task := asyncio.create_task(self.ask(*arrival)))
            task.add_done_callback(tasks.discard)
        print("sent", flush=True)
        await asyncio.gather(*tasks)

    async def quiet(self, within: float, seconds: float) -> None:
        """One caller, until it is answered within `within` seconds, for `seconds` at most."""
        for number in range(10**9):
            if await self.ask(number, time.perf_counter()) != 200:
                await asyncio.sleep(PAUSE_S)
            elif self.is_quiet(within):
                return
            if time.perf_counter() - self.started_at > seconds:
                return

    def is_quiet(self, within: float) -> bool:
        """Whether the last answer came within so many seconds."""
        return bool(self.tally.answered) and self.tally.answered[-1][1] <= within


async def run(url: str, photos: list[bytes], kind: str, amount: float, seconds: float) -> dict[str, Any]:
    """One measurement."""
    process = psutil.Process()
    before = process.cpu_times()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        flood = Flood(url, photos, session)
        ways: dict[str, Callable[[float, float], Awaitable[None]]]
        ways = {"closed": flood.closed, "open": flood.open, "quiet": flood.quiet}
        await ways[kind](amount, seconds)
    took, after = time.perf_counter() - flood.started_at, process.cpu_times()
    used = after.user + after.system - before.user - before.system
    found = {"kind": kind, "amount": amount, **summary(flood.tally, seconds, took)}
    return {**found, "quiet": flood.is_quiet(amount), "generator_cores": round(used / took, 3)}


def summary(tally: Tally, seconds: float, took: float) -> dict[str, Any]:
    """The figures of what came back. Rates count what came within `seconds`; latencies, all of it."""
    answered = [latency for _, latency in tally.answered]
    refused = [latency for _, latency in tally.refused]
    return {
        "seconds": seconds,
        "took": round(took, 3),
        "goodput": round(sum(moment <= seconds for moment, _ in tally.answered) / seconds, 3),
        "per_second": by_second([moment for moment, _ in tally.answered], took),
        "refused_per_second": by_second([moment for moment, _ in tally.refused], took),
        **{f"p{share}": quantile(answered, share / 100) for share in (50, 99)},
        **{f"refused_p{share}": quantile(refused, share / 100) for share in (50, 99)},
        **{f"refused_inside_p{share}": quantile(tally.inside, share / 100) for share in (50, 99)},
        "late_p99": quantile(tally.late, 0.99),
        "statuses": dict(tally.statuses),
    }


def by_second(moments: list[float], took: float) -> list[int]:
    """How many of the moments lie in each whole second."""
    counts = Counter(int(moment) for moment in moments)
    return [counts[second] for second in range(int(took))]


def total_s(server_timing: str) -> float | None:
    """Seconds of the stage `total` of a header Server-Timing; None where it has none.

    >>> total_s("decode;dur=4.0, total;dur=12.5")
    0.0125
    """
    for stage in server_timing.split(","):
        name, _, rest = stage.strip().partition(";dur=")
        if name == "total":
            return float(rest) / 1000
    return None


def main() -> None:
    """Measure, and print one JSON object."""
    url, folder, kind, amount, seconds = sys.argv[1:]
    print(json.dumps(asyncio.run(run(url, read_photos(folder), kind, float(amount), float(seconds)))))


if __name__ == "__main__":
    main()
