"""In a flood most images are refused by their headers, without being decoded and without asking the model. Pure."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from serve.batching import Overloaded

# So many refusals by the model within a second are a flood. It is over when for so long nobody was refused, neither by
# the model nor by us.
FLOOD = 10
FLOOD_S = 2.0
# In a flood so much more is let through than is answered meanwhile: the queue stays full, and few are refused late. A
# model that has refused nothing for FLOOD_S may have become faster: from then on it is twice as much every FLOOD_S.
SURPLUS = 1.03
SPEED_MEMORY_S = 10.0  # answers of so long ago count a third
SAVED_S = 0.5  # what was not let through is saved up for so long
MOST_DOUBLINGS = 10.0


class Refusals:
    """What the model refused and answered last.

    A refusal by the model comes after decoding and after the way to it: dear for the endpoint, late for the caller. In
    a flood only as many pixels are let through as the model answers, and a few more. Only images as large as what was
    refused are held back: a smaller one may still fit. Belongs to one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moments: deque[float] = deque(maxlen=FLOOD)
        self._pixels = 0
        self._until = -math.inf
        self._error = Overloaded("")
        self._answered = 0.0  # pixels, fading
        self._credit = 0.0  # pixels that may pass; the last one through may overdraw it, whatever its size
        self._seen_at = clock()
        self._refused_at = -math.inf  # by the model
        self._passed_at = -math.inf

    def refused(self, pixels: int, error: Overloaded) -> None:
        """The model refused an image of so many pixels."""
        now = self._clock()
        self._moments.append(now)
        self._pixels = min(pixels, self._pixels) if now < self._until else pixels
        self._error = error
        self._refused_at = now
        if now < self._until or (len(self._moments) == FLOOD and now - self._moments[0] <= 1):
            self._until = now + FLOOD_S

    def answered(self, pixels: int) -> None:
        """The model answered an image of so many pixels."""
        self._pass_time()
        self._answered += pixels

    def check(self, pixels: int) -> None:
        """Raise Overloaded where, in a flood, an image of so many pixels is more than the model answers meanwhile."""
        self.look(pixels)
        if self._in_flood(pixels):
            self._credit -= pixels
            self._passed_at = self._seen_at

    def look(self, pixels: int) -> None:
        """As `check`, for an image that is not let through yet."""
        self._pass_time()
        if not self._in_flood(pixels):
            return
        now = self._seen_at
        # One in FLOOD_S passes in any case: of a model that answered nothing yet no speed is known.
        if self._credit <= 0 and now - max(self._refused_at, self._passed_at) < FLOOD_S:
            self._until = now + FLOOD_S
            raise Overloaded(str(self._error), self._error.retry_after_s)

    def _in_flood(self, pixels: int) -> bool:
        return pixels >= self._pixels and self._seen_at < self._until

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._seen_at = now - self._seen_at, now
        quiet = (now - self._refused_at - FLOOD_S) / FLOOD_S
        surplus = SURPLUS * 2 ** min(max(quiet, 0.0), MOST_DOUBLINGS)
        speed = surplus * self._answered / SPEED_MEMORY_S
        self._credit = min(self._credit + speed * passed, speed * SAVED_S)
        self._answered *= math.exp(-passed / SPEED_MEMORY_S)
