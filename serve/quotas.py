"""How much a key may ask for: token buckets, in one process or leased from a ledger that all ingress replicas share.

A bucket holds up to `burst` tokens and gains `rate` a second, so that in any time t no more than burst + rate · t are
taken. A request takes from all buckets of its key, or from none.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from serve.keys import Allowance, Key

log = logging.getLogger("sceneray.serve")

# A replica takes tokens for this long at a time, and gives up what it has not spent after LEASE_KEPT_S.
LEASE_S = 0.25
LEASE_KEPT_S = 2.0
LEDGER_TIMEOUT_S = 0.5
LEDGER_RETRY_S = 1.0  # after a ledger failed, it is asked again

Amounts = Mapping[str, float]  # tokens by the allowance's name
Clock = Callable[[], float]


class Quotas(Protocol):
    """What the site needs of quotas."""

    async def take(self, key: Key, pixels: int = 0, requests: int = 0) -> float:
        """Take from the key's quotas: 0.0 where that was possible, else the seconds after which it may be.

        `math.inf`: never, since it is more than the key may ask for at once.
        """


def amounts(key: Key, pixels: int, requests: int) -> dict[str, float]:
    """Tokens that so much takes, by the names of the key's allowances."""
    wanted = {"requests": requests, "pixels_per_s": pixels, "pixels_per_day": pixels}
    return {name: float(wanted[name]) for name in key.allowances if wanted[name]}


class Buckets:
    """The token buckets of many keys. Not thread-safe; a bucket that nobody used yet is full."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}  # (key, allowance) -> tokens, and when

    def take(
        self, key_id: str, rules: Mapping[str, Allowance], need: Amounts, want: Amounts | None = None
    ) -> tuple[float, dict[str, float]]:
        """(0.0, what was taken: at least `need`, at most `want`), or (seconds to wait, nothing)."""
        now = self._clock()
        levels = {name: self._level(key_id, name, rules[name], now) for name in need}
        wait_s = max((_wait(need[name], levels[name], rules[name]) for name in need), default=0.0)
        if wait_s > 0:
            return wait_s, {}
        wanted = want or need
        taken = {name: max(need[name], min(wanted[name], levels[name])) for name in need}
        for name, tokens in taken.items():
            # A hair below zero is rounding.
            self._levels[key_id, name] = (max(0.0, levels[name] - tokens), now)
        return 0.0, taken

    def _level(self, key_id: str, name: str, rule: Allowance, now: float) -> float:
        level, at = self._levels.get((key_id, name), (rule.burst, now))
        return min(rule.burst, level + (now - at) * rule.rate)


class LocalQuotas:
    """Quotas of one process. `share`: the part of each allowance that is this process's own."""

    def __init__(self, share: float = 1.0, clock: Clock = time.monotonic) -> None:
        self._share = share
        self._buckets = Buckets(clock)

    async def take(self, key: Key, pixels: int = 0, requests: int = 0) -> float:
        """As Quotas.take."""
        need = amounts(key, pixels, requests)
        if never(key, need):
            return math.inf
        rules = {name: _part(rule, self._share, need.get(name, 0.0)) for name, rule in key.allowances.items()}
        wait_s, _ = self._buckets.take(key.id, rules, need)
        return wait_s


# (key id, allowances, need, want) -> what Buckets.take answers, from the ledger that all replicas ask.
Ledger = Callable[[str, Mapping[str, Allowance], Amounts, Amounts], Awaitable[tuple[float, dict[str, float]]]]


@dataclass
class _Wallet:
    """Tokens of one key that this replica holds, since when; and what was refused, until when."""

    tokens: dict[str, float]
    since: float
    lock: asyncio.Lock
    refused: tuple[dict[str, float], float] | None = None


class LeasedQuotas:
    """Quotas over many processes: tokens are leased from one ledger in small batches.

    Over all replicas no more is spent than the ledger's buckets gave out. A ledger that fails or is silent does not
    stop the endpoint: until it answers again, each replica grants its share, allowance / replicas, by itself.
    """

    def __init__(self, ledger: Ledger, replicas: int = 1, clock: Clock = time.monotonic) -> None:
        self._ledger = ledger
        self._fallback = LocalQuotas(1 / replicas, clock)
        self._clock = clock
        self._wallets: dict[str, _Wallet] = {}
        self._ledger_down_until = 0.0

    async def take(self, key: Key, pixels: int = 0, requests: int = 0) -> float:
        """As Quotas.take."""
        need = amounts(key, pixels, requests)
        if not need:
            return 0.0
        if never(key, need):
            return math.inf
        wallet = self._wallets.setdefault(key.id, _Wallet({}, self._clock(), asyncio.Lock()))
        async with wallet.lock:  # one lease at a time: who waits here may be served by it
            if self._clock() - wallet.since > LEASE_KEPT_S:
                wallet.tokens.clear()
            wait_s = self._still_refused(wallet, need)
            if wait_s <= 0:
                wait_s = await self._fill(key, wallet, need)
            if wait_s > 0:
                return wait_s
            if any(wallet.tokens.get(name, 0.0) < tokens for name, tokens in need.items()):
                return await self._fallback.take(key, pixels, requests)
            for name, tokens in need.items():
                wallet.tokens[name] -= tokens
            return 0.0

    def _still_refused(self, wallet: _Wallet, need: Amounts) -> float:
        """Seconds for which the ledger has said no to as much or less; a caller that is refused costs no call."""
        if wallet.refused is None:
            return 0.0
        refused, until = wallet.refused
        if all(need.get(name, 0.0) >= tokens for name, tokens in refused.items()):
            return max(0.0, until - self._clock())
        return 0.0

    async def _fill(self, key: Key, wallet: _Wallet, need: Amounts) -> float:
        """Lease what the wallet lacks; the wait where the ledger refuses, 0.0 also where it does not answer."""
        short = {name: tokens - wallet.tokens.get(name, 0.0) for name, tokens in need.items()}
        short = {name: tokens for name, tokens in short.items() if tokens > 0}
        if not short or self._clock() < self._ledger_down_until:
            return 0.0
        rules = key.allowances
        want = {name: max(tokens, rules[name].rate * LEASE_S) for name, tokens in short.items()}
        try:
            wait_s, leased = await asyncio.wait_for(self._ledger(key.id, rules, short, want), LEDGER_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever keeps the ledger from answering, requests go on
            log.warning("the quotas' ledger does not answer; each replica grants its share: %r", error)
            self._ledger_down_until = self._clock() + LEDGER_RETRY_S
            return 0.0
        now = self._clock()
        if wait_s > 0:
            wallet.refused = (dict(need), now + min(wait_s, LEASE_S))
            return wait_s
        wallet.refused = None
        wallet.since = now
        for name, tokens in leased.items():
            wallet.tokens[name] = wallet.tokens.get(name, 0.0) + tokens
        return 0.0


def never(key: Key, need: Amounts) -> bool:
    """True where `need` is more than the key may ever ask for at once."""
    return any(tokens > key.allowances[name].burst for name, tokens in need.items())


def _wait(need: float, level: float, rule: Allowance) -> float:
    return max(0.0, (need - level) / rule.rate)


def _part(rule: Allowance, share: float, need: float) -> Allowance:
    """A replica's share. One request or image that the whole allowance would let through must pass a share too."""
    burst = rule.burst * share
    return Allowance(rule.rate * share, min(rule.burst, max(burst, need)))
