"""Quotas hold: never more than burst + rate · t, in one process, over many that lease, and while the ledger is lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.keys import Allowance, Key
from serve.quotas import LEASE_S, LEDGER_RETRY_S, Amounts, Buckets, LeasedQuotas, LocalQuotas

STEPS = st.lists(
    st.tuples(st.floats(0, 5, allow_nan=False), st.integers(1, 400), st.integers(0, 2)), min_size=1, max_size=60
)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Ledger:
    """The ledger of a test: real buckets in this process, that may be lost; counts how often it is asked."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.buckets = Buckets(clock)
        self.asked = 0
        self.is_lost = False

    async def __call__(
        self, key_id: str, rules: Mapping[str, Allowance], need: Amounts, want: Amounts
    ) -> tuple[float, dict[str, float]]:
        self.asked += 1
        if self.is_lost:
            raise ConnectionError("the actor died")
        return self.buckets.take(key_id, rules, need, want)


def key(**limits: float) -> Key:
    """A key with quotas."""
    return Key.model_validate({"id": "alice", "sha256": "ab" * 32, **limits})


def within(taken: float, rate: float, burst: float, seconds: float) -> bool:
    """True where so much may have been taken; a millionth for rounding."""
    return taken <= (burst + rate * seconds) * (1 + 1e-6)


@given(steps=STEPS, rate=st.floats(0.5, 500), burst_s=st.floats(0.5, 20))
def test_one_process_never_gives_more_than_burst_and_rate(
    steps: list[tuple[float, int, int]], rate: float, burst_s: float
) -> None:
    """Whatever is asked for and when; and who waits as long as told is then served."""
    clock, alice = Clock(), key(pixels_per_s=rate, burst_s=burst_s)
    quotas, started_at, taken = LocalQuotas(clock=clock), clock.now, 0.0
    for pause, pixels, _ in steps:
        clock.now += pause
        wait_s = asyncio.run(quotas.take(alice, pixels))
        if wait_s == 0:
            taken += pixels
        elif math.isinf(wait_s):
            assert pixels > rate * burst_s
        else:
            clock.now += wait_s + 1e-6
            assert asyncio.run(quotas.take(alice, pixels)) == 0
            taken += pixels
        assert within(taken, rate, rate * burst_s, clock.now - started_at)


@given(steps=STEPS, rate=st.floats(1, 500))
def test_many_replicas_never_give_more_together(steps: list[tuple[float, int, int]], rate: float) -> None:
    """Three replicas that lease from one ledger hold the quota over all of them."""
    clock, alice = Clock(), key(pixels_per_s=rate, burst_s=3, requests_per_s=2)
    ledger = Ledger(clock)
    replicas = [LeasedQuotas(ledger, 3, clock) for _ in range(3)]
    started_at, pixels_taken, requests_taken = clock.now, 0, 0

    async def play() -> None:
        nonlocal pixels_taken, requests_taken
        for pause, pixels, index in steps:
            clock.now += pause
            if await replicas[index].take(alice, pixels, 1) == 0:
                pixels_taken += pixels
                requests_taken += 1
            assert within(pixels_taken, rate, 3 * rate, clock.now - started_at)
            assert within(requests_taken, 2, 6, clock.now - started_at)

    asyncio.run(play())


def test_a_quota_is_taken_whole_or_not_at_all() -> None:
    """Where one of a key's buckets lacks tokens, the others keep theirs; a day's bucket is full at the start."""
    clock = Clock()
    alice = key(requests_per_s=1, burst_s=2, pixels_per_day=86_400)
    quotas = LocalQuotas(clock=clock)

    async def play() -> None:
        assert await quotas.take(alice, 80_000, 1) == 0
        assert await quotas.take(alice, 10_000, 1) == pytest.approx(3600)
        assert await quotas.take(alice, 6400, 1) == 0, "the refused request took none of the requests' tokens"
        assert await quotas.take(alice, 0, 1) == pytest.approx(1)
        assert math.isinf(await quotas.take(alice, 86_401))
        assert await quotas.take(key(), 10**9, 1) == 0, "a key without quotas has none"

    asyncio.run(play())


def test_a_lease_spares_most_calls() -> None:
    """A thousand requests within a quota ask the ledger for a lease now and then; refused ones hardly ever."""
    clock = Clock()
    ledger = Ledger(clock)
    quotas = LeasedQuotas(ledger, 2, clock)
    alice = key(requests_per_s=400, burst_s=10)

    async def play() -> None:
        for _ in range(1000):
            assert await quotas.take(alice, 0, 1) == 0
        assert ledger.asked <= 1 + 1000 / (400 * LEASE_S)
        before = ledger.asked
        waits = [await quotas.take(key(pixels_per_s=1, burst_s=1), 1) for _ in range(100)]
        assert waits[0] == 0
        assert min(waits[1:]) > 0
        assert ledger.asked <= before + 2

    asyncio.run(play())


def test_tokens_that_a_replica_does_not_spend_are_dropped() -> None:
    """What was leased minutes ago is not spent on top of what flowed in since: the ledger is asked again."""
    clock = Clock()
    ledger = Ledger(clock)
    quotas = LeasedQuotas(ledger, 1, clock)
    alice = key(requests_per_s=100, burst_s=1)

    async def play() -> None:
        await quotas.take(alice, 0, 1)
        await quotas.take(alice, 0, 1)
        assert ledger.asked == 1
        clock.now += 60
        await quotas.take(alice, 0, 1)
        assert ledger.asked == 2

    asyncio.run(play())


def test_a_lost_ledger_stops_nobody_and_opens_no_door() -> None:
    """Until it answers again a replica grants its share, and does not ask at each request; then the ledger rules."""
    clock = Clock()
    ledger = Ledger(clock)
    quotas = LeasedQuotas(ledger, 4, clock)
    alice = key(requests_per_s=4, burst_s=10)
    ledger.is_lost = True

    async def play() -> None:
        served = [await quotas.take(alice, 0, 1) == 0 for _ in range(30)]
        assert sum(served) == 10, "a quarter of the burst of 40"
        assert ledger.asked == 1
        clock.now += LEDGER_RETRY_S / 2
        assert await quotas.take(alice, 0, 1) > 0, "half a token of its share of one a second"
        ledger.is_lost = False
        clock.now += LEDGER_RETRY_S
        assert await quotas.take(alice, 0, 1) == 0
        assert ledger.asked == 2

    asyncio.run(play())


def test_changed_limits_hold_at_once() -> None:
    """A key whose file entry got a smaller quota keeps no more than the new burst."""
    quotas = LocalQuotas(clock=Clock())

    async def play() -> None:
        await quotas.take(key(pixels_per_s=100, burst_s=10), 1)
        assert await quotas.take(key(pixels_per_s=10, burst_s=10), 100) == 0
        assert await quotas.take(key(pixels_per_s=10, burst_s=10), 1) > 0

    asyncio.run(play())
