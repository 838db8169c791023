"""The load generator: a process of its own that sends photographs and writes down when and what came back.

    python -m benchmarks.endpoints.load URL PHOTOS closed CALLERS SECONDS [json]
    python -m benchmarks.endpoints.load URL PHOTOS open RATE SECONDS [json]

`closed`: so many callers, each of which sends the next photograph when its answer is there. `open`: arrivals at random
(Poisson) whatever the server does; latency counts from the moment that a request was meant to be sent, so that a server
which stalls is charged for everybody it kept waiting. Uploads are multipart, or with `json` base64 in a JSON object.
Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from benchmarks.endpoints.work import read_photos

TIMEOUT_S = 120.0
SEED = 11


@dataclass
class Tally:
    """What came back. Latencies in seconds, of answers with status 200 and of refusals (429, 503) apart."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    ended: list[float] = field(default_factory=list)  # when each 200 was there, on the generator's clock


class Load:
    """A client of one endpoint."""

    def __init__(self, url: str, photos: list[bytes], as_json: bool, session: aiohttp.ClientSession) -> None:
        self.url = f"{url}/v1/segment"
        self.photos = photos
        self.bodies = [json.dumps({"image": base64.b64encode(data).decode()}) for data in photos] if as_json else None
        self.session = session
        self.tally = Tally()

    async def ask(self, number: int, due: float) -> None:
        """Send photograph `number`; its latency counts from `due`."""
        try:
            async with self.session.post(self.url, **self._body(number % len(self.photos))) as answer:
                await answer.read()
                status = str(answer.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        now = time.perf_counter()
        self.tally.statuses[status] += 1
        if status == "200":
            self.tally.answered.append(now - due)
            self.tally.ended.append(now)
        elif status in ("429", "503"):
            self.tally.refused.append(now - due)

    def _body(self, number: int) -> dict[str, Any]:
        if self.bodies is not None:
            return {"data": self.bodies[number], "headers": {"Content-Type": "application/json"}}
        form = aiohttp.FormData()
        form.add_field("image", self.photos[number], filename="photo.jpg", content_type="image/jpeg")
        return {"data": form}

    async def closed(self, callers: int, seconds: float) -> None:
        """Each caller waits for its answer before it asks again."""
        numbers = iter(range(10**9))
        until = time.perf_counter() + seconds

        async def call() -> None:
            while time.perf_counter() < until:
                await self.ask(next(numbers), time.perf_counter())

        await asyncio.gather(*(call() for _ in range(callers)))

    async def open(self, rate: float, seconds: float) -> None:
        """Requests at random moments, `rate` a second."""
        tasks = [asyncio.create_task(self.ask(*arrival)) async for arrival in arrivals(rate, seconds)]
        await asyncio.gather(*tasks)


async def arrivals(rate: float, seconds: float) -> AsyncIterator[tuple[int, float]]:
    """Poisson arrivals for so many seconds from now on, each when it is due: its number, and when it was due."""
    chance, started_at = random.Random(SEED), time.perf_counter()
    due, number = started_at + chance.expovariate(rate), 0
    while due < started_at + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield number, due
        due, number = due + chance.expovariate(rate), number + 1


async def run(url: str, photos: list[bytes], kind: str, amount: float, seconds: float, as_json: bool) -> dict[str, Any]:
    """One measurement."""
    process = psutil.Process()
    before, started_at = process.cpu_times(), time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        load = Load(url, photos, as_json, session)
        await (load.closed(int(amount), seconds) if kind == "closed" else load.open(amount, seconds))
    took, after = time.perf_counter() - started_at, process.cpu_times()
    tally = load.tally
    in_time = sum(moment <= started_at + seconds for moment in tally.ended)
    return {
        "kind": kind,
        "amount": amount,
        "seconds": round(took, 2),
        "rate": round(len(tally.answered) / took, 3),
        "goodput": round(in_time / seconds, 3),
        **{f"p{share}": quantile(tally.answered, share / 100) for share in (50, 99)},
        "refused_p99": quantile(tally.refused, 0.99),
        "statuses": dict(tally.statuses),
        "generator_cores": round((after.user + after.system - before.user - before.system) / took, 3),
    }


def quantile(values: list[float], share: float) -> float | None:
    """The value that `share` of all lie at or below; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)


def main() -> None:
    """Measure, and print one JSON object."""
    url, folder, kind, amount, seconds, *form = sys.argv[1:]
    photos, as_json = read_photos(folder), form == ["json"]
    print(json.dumps(asyncio.run(run(url, photos, kind, float(amount), float(seconds), as_json))))


if __name__ == "__main__":
    main()
