"""Dynamic batching with a key: only items of one key share a batch. Plain asyncio; nothing of Ray, nothing of images.

Ray's own `serve.batch` is one first-in-first-out queue: it cannot keep images of different shapes apart, and padding
them to one shape changes PSPNet's answers. Here each key has its queue, and a batch leaves when

    it is full (items, or cost: pixels), or its first item has waited `max_wait_s`,

and a worker is free; among the keys whose batch may leave, the one whose first item has waited longest goes first, so
that no key starves. What waits is bounded by cost, and by the time that it will take: past the bounds `submit` raises
Overloaded at once. An item whose deadline has passed is not run.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sceneray.errors import ServingError

T = TypeVar("T")
R = TypeVar("R")

# Weight of the newest batch in the running estimate of seconds per cost.
NEWEST_WEIGHT = 0.3


class Overloaded(ServingError):
    """The queue is full. `retry_after_s` is the time in which what waits now should be done."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)  # both, or the exception would not survive pickling
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class TooLate(ServingError):
    """The item's deadline passed before its batch could run."""


class OutOfMemory(ServingError):
    """Not even one item fits on the model."""


@dataclass(frozen=True)
class Limits:
    """When a batch leaves, and how much may wait."""

    max_items: int
    max_cost: int  # of one batch; an item above it goes alone
    max_queued_cost: int
    max_wait_s: float
    workers: int = 1  # batches on the model at a time
    max_queue_s: float = math.inf  # what waits may take this long, as fast as the last batches were


@dataclass(frozen=True)
class Batched(Generic[R]):
    """One item's result, how many items shared its batch, and how long it waited and ran."""

    result: R
    batch_size: int
    waited_s: float = field(default=0.0, compare=False)
    ran_s: float = field(default=0.0, compare=False)


@dataclass(eq=False)  # compared by identity: items may be arrays
class _Waiting(Generic[T, R]):
    item: T
    cost: int
    since: float  # on the loop's clock
    until: float | None  # likewise: when nobody waits for it any more
    future: asyncio.Future[Batched[R]]


class KeyedBatcher(Generic[T, R]):
    """Gathers items by key and runs them together. Belongs to one event loop; not thread-safe."""

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        key: Callable[[T], Hashable],
        cost: Callable[[T], int],
        limits: Limits,
    ) -> None:
        """`run` answers a batch of equal keys, one result an item, in order; it must not block the event loop."""
        self._run = run
        self._key = key
        self._cost = cost
        self._limits = limits
        self._queues: dict[Hashable, deque[_Waiting[T, R]]] = {}
        self._queued_cost = 0
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_cost = 0.0

    @property
    def queued_cost(self) -> int:
        """Cost of all that waits for a batch."""
        return self._queued_cost

    async def submit(self, item: T, within_s: float | None = None, admitted: bool = False) -> Batched[R]:
        """The item's result, once its batch has run.

        Raises Overloaded where the queue is full, unless the item belongs to something that was `admitted` before;
        TooLate where its batch could not start `within_s` seconds; and whatever `run` raised for the item's batch.
        Cancelling the caller takes a waiting item out of its queue.
        """
        loop = asyncio.get_running_loop()
        cost = max(1, self._cost(item))
        if not admitted and not self._has_room(cost):
            wait_s = self._retry_after_s()
            raise Overloaded(f"the queue is full; try again in {wait_s} s.", wait_s)
        until = None if within_s is None else loop.time() + within_s
        waiting = _Waiting(item, cost, loop.time(), until, loop.create_future())
        key = self._key(item)
        self._queues.setdefault(key, deque()).append(waiting)
        self._queued_cost += cost
        self._dispatch()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            self._forget(key, waiting)
            raise

    def _dispatch(self) -> None:
        """Start every batch that may leave now, and set the timer for the next that may leave later."""
        loop = asyncio.get_running_loop()
        while len(self._running) < self._limits.workers and (key := self._due(loop.time())) is not None:
            batch = self._in_time(self._take(key), loop.time())
            if not batch:
                continue
            task = loop.create_task(self._execute(batch))
            self._running.add(task)
            task.add_done_callback(self._finished)
        self._set_timer(loop)

    def _due(self, now: float) -> Hashable | None:
        """The key whose batch may leave and whose first item has waited longest; None where no batch may leave."""
        due = [key for key, queue in self._queues.items() if self._deadline(queue) <= now or self._full(queue)]
        return min(due, key=lambda key: self._queues[key][0].since, default=None)

    def _deadline(self, queue: deque[_Waiting[T, R]]) -> float:
        return queue[0].since + self._limits.max_wait_s

    def _full(self, queue: deque[_Waiting[T, R]]) -> bool:
        if len(queue) >= self._limits.max_items:
            return True
        # Full as well when another item like the first would not fit.
        return sum(waiting.cost for waiting in queue) + queue[0].cost > self._limits.max_cost

    def _take(self, key: Hashable) -> list[_Waiting[T, R]]:
        queue = self._queues[key]
        batch = [queue.popleft()]
        cost = batch[0].cost
        while queue and len(batch) < self._limits.max_items and cost + queue[0].cost <= self._limits.max_cost:
            batch.append(queue.popleft())
            cost += batch[-1].cost
        if not queue:
            del self._queues[key]
        self._queued_cost -= cost
        return batch

    def _in_time(self, batch: list[_Waiting[T, R]], now: float) -> list[_Waiting[T, R]]:
        """Those of a batch that somebody still waits for."""
        for waiting in batch:
            if waiting.until is not None and waiting.until < now and not waiting.future.done():
                waiting.future.set_exception(TooLate(f"no model was free in {now - waiting.since:.1f} s."))
        return [waiting for waiting in batch if not waiting.future.done()]

    async def _execute(self, batch: list[_Waiting[T, R]]) -> None:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        try:
            results = await self._run([waiting.item for waiting in batch])
            if len(results) != len(batch):
                raise ServingError(f"a batch of {len(batch)} items gave {len(results)} results.")
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - handed on to each caller
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        ended_at = loop.time()
        self._note_speed((ended_at - started_at) / sum(waiting.cost for waiting in batch))
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():  # its caller may have gone
                waiting.future.set_result(
                    Batched(result, len(batch), started_at - waiting.since, ended_at - started_at)
                )

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._dispatch()

    def _forget(self, key: Hashable, waiting: _Waiting[T, R]) -> None:
        queue = self._queues.get(key)
        if queue is None or waiting not in queue:
            return
        queue.remove(waiting)
        self._queued_cost -= waiting.cost
        if not queue:
            del self._queues[key]
        self._dispatch()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # With all workers busy the end of a batch dispatches; no timer is needed.
        if self._queues and len(self._running) < self._limits.workers:
            first = min(self._deadline(queue) for queue in self._queues.values())
            self._timer = loop.call_at(first, self._dispatch)

    def _note_speed(self, seconds_per_cost: float) -> None:
        if self._seconds_per_cost == 0:
            self._seconds_per_cost = seconds_per_cost
        self._seconds_per_cost += NEWEST_WEIGHT * (seconds_per_cost - self._seconds_per_cost)

    def _has_room(self, cost: int) -> bool:
        """True where an item may wait: by its size, and by how long what waits before it takes."""
        fits = self._queued_cost + cost <= self._limits.max_queued_cost
        return fits and self._drained_in_s() <= self._limits.max_queue_s

    def _drained_in_s(self) -> float:
        return self._seconds_per_cost * self._queued_cost / self._limits.workers

    def _retry_after_s(self) -> int:
        return max(1, math.ceil(self._drained_in_s()))
