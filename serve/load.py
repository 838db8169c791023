"""How much a model replica has to do, as means over time. Plain numbers; nothing of Ray.

A look at a queue now and then sees it full or empty by chance. A meter keeps the integral over time of each level
instead, so that the mean between any two looks is exact, and any number of readers may look as often as they like.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

Clock = Callable[[], float]


class LoadMeter:
    """Levels by name: what is inside now, and the integral since the start. Belongs to one event loop."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen_at = clock()
        self.inside: Counter[str] = Counter()
        self._integrals: dict[str, float] = {}

    @contextlib.contextmanager
    def holding(self, name: str, amount: int = 1) -> Iterator[None]:
        """Raise the level `name` by `amount` while the context lasts."""
        self._pass_time()
        self.inside[name] += amount
        try:
            yield
        finally:
            self._pass_time()
            self.inside[name] -= amount

    def look(self) -> tuple[float, dict[str, float]]:
        """(now, the integral of every level: amount × seconds)."""
        self._pass_time()
        return self._seen_at, dict(self._integrals)

    def reader(self) -> Callable[[], dict[str, float]]:
        """A function that answers with the mean of each level since it was last called, or since now."""
        last = self.look()

        def means() -> dict[str, float]:
            nonlocal last
            (before, integrals), last = last, self.look()
            passed = last[0] - before
            if passed <= 0:
                return {name: float(level) for name, level in self.inside.items()}
            return {name: (total - integrals.get(name, 0.0)) / passed for name, total in last[1].items()}

        return means

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._seen_at = now - self._seen_at, now
        for name, level in self.inside.items():
            self._integrals[name] = self._integrals.get(name, 0.0) + level * passed
