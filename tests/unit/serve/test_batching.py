"""The keyed batcher, on a real event loop whose clock jumps instead of waiting."""

from __future__ import annotations

import asyncio
import pickle
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray.errors import ServingError
from serve.batching import Batched, KeyedBatcher, Limits, Overloaded


class JumpingSelector(selectors.DefaultSelector):
    """Never sleeps: where the loop would wait for a timer, the loop's clock is moved there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("nothing is due and nothing ever will be: the batcher forgot somebody")
        self.now += max(0.0, timeout)
        return super().select(0)


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run `work` on an event loop of jumping time."""

    def loop() -> asyncio.AbstractEventLoop:
        selector = JumpingSelector()
        made = asyncio.SelectorEventLoop(selector)
        made.time = lambda: selector.now  # type: ignore[method-assign]
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work())


@dataclass(frozen=True)
class Item:
    """Something to batch: a shape, and a number to tell it from others."""

    key: str
    number: int
    cost: int = 1


@dataclass
class Recorder:
    """A slow model: takes `seconds` a batch, answers ten times each number, and writes down what it was given."""

    seconds: float = 1.0
    batches: list[list[Item]] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def __call__(self, items: Sequence[Item]) -> list[int]:
        self.batches.append(list(items))
        self.started.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return [10 * item.number for item in items]

    @property
    def numbers(self) -> list[list[int]]:
        return [[item.number for item in batch] for batch in self.batches]


def batcher(recorder: Callable[[Sequence[Item]], Any], **changes: Any) -> KeyedBatcher[Item, int]:
    limits = {"max_items": 4, "max_cost": 100, "max_queued_cost": 1000, "max_wait_s": 0.5} | changes
    return KeyedBatcher(recorder, key=lambda item: item.key, cost=lambda item: item.cost, limits=Limits(**limits))


def test_items_of_one_key_share_a_batch_and_each_gets_its_own_answer() -> None:
    """Four items of one key run as one batch of four, and each caller gets its own result."""
    recorder = Recorder()

    async def work() -> list[Batched[int]]:
        b = batcher(recorder)
        return await asyncio.gather(*(b.submit(Item("a", n)) for n in range(4)))

    answers = run(work)
    assert recorder.numbers == [[0, 1, 2, 3]]
    assert answers == [Batched(10 * n, 4) for n in range(4)]


def test_keys_never_mix() -> None:
    """Items that arrive alternately with two keys leave in two batches, one a key."""
    recorder = Recorder()

    async def work() -> None:
        b = batcher(recorder)
        await asyncio.gather(*(b.submit(Item("ab"[n % 2], n)) for n in range(6)))

    run(work)
    assert recorder.numbers == [[0, 2, 4], [1, 3, 5]]


def test_a_first_item_waits_no_longer_than_max_wait() -> None:
    """A lone item leaves exactly when it has waited max_wait, though others of its key came meanwhile."""
    recorder = Recorder()

    async def work() -> None:
        b = batcher(recorder, max_wait_s=0.5)
        first = asyncio.ensure_future(b.submit(Item("a", 0)))
        await asyncio.sleep(0.4)
        second = asyncio.ensure_future(b.submit(Item("a", 1)))
        await asyncio.gather(first, second)

    run(work)
    assert recorder.numbers == [[0, 1]]
    assert recorder.started == [pytest.approx(0.5)]


def test_a_full_batch_leaves_at_once() -> None:
    """Once max_items are there, nothing waits for the clock."""
    recorder = Recorder()

    async def work() -> None:
        b = batcher(recorder, max_items=2, max_wait_s=60)
        await asyncio.gather(*(b.submit(Item("a", n)) for n in range(2)))

    run(work)
    assert recorder.started == [0.0]


def test_cost_closes_a_batch() -> None:
    """Items of 40 under a budget of 100 leave in twos, the second pair without waiting for the clock."""
    recorder = Recorder(seconds=0.1)

    async def work() -> None:
        b = batcher(recorder, max_cost=100, max_wait_s=60, max_items=8)
        await asyncio.gather(*(b.submit(Item("a", n, cost=40)) for n in range(4)))

    run(work)
    assert recorder.numbers == [[0, 1], [2, 3]]
    assert recorder.started == [0.0, pytest.approx(0.1)]


def test_an_item_above_the_budget_goes_alone() -> None:
    """An item dearer than a whole batch is answered all the same, by itself."""
    recorder = Recorder()

    async def work() -> list[Batched[int]]:
        b = batcher(recorder, max_cost=100)
        return await asyncio.gather(b.submit(Item("a", 1, cost=500)), b.submit(Item("a", 2, cost=1)))

    assert run(work) == [Batched(10, 1), Batched(20, 1)]


def test_the_longest_waiting_key_goes_first() -> None:
    """While the model is busy, a key that keeps filling does not overtake the one that has waited longer."""
    recorder = Recorder(seconds=10)

    async def work() -> None:
        b = batcher(recorder, max_items=2, max_wait_s=0.5)
        tasks = [asyncio.ensure_future(b.submit(Item("busy", n))) for n in range(2)]
        await asyncio.sleep(1)
        tasks.append(asyncio.ensure_future(b.submit(Item("rare", 100))))
        await asyncio.sleep(1)
        tasks += [asyncio.ensure_future(b.submit(Item("hot", n))) for n in range(200, 204)]
        await asyncio.gather(*tasks)

    run(work)
    assert recorder.numbers == [[0, 1], [100], [200, 201], [202, 203]]


@pytest.mark.parametrize("workers", [1, 3])
def test_at_most_so_many_batches_run_at_a_time(workers: int) -> None:
    """With many batches waiting, exactly `workers` of them run together."""
    recorder = Recorder()

    async def work() -> None:
        b = batcher(recorder, max_items=1, workers=workers)
        await asyncio.gather(*(b.submit(Item("a", n)) for n in range(9)))

    run(work)
    assert recorder.most_running == workers
    assert len(recorder.batches) == 9


def test_a_cancelled_caller_leaves_the_queue() -> None:
    """A caller who goes away while waiting is not run, frees its place, and does not disturb the others."""
    recorder = Recorder()

    async def work() -> tuple[Any, int]:
        b = batcher(recorder, max_queued_cost=2)
        leaving = asyncio.ensure_future(b.submit(Item("a", 1)))
        staying = asyncio.ensure_future(b.submit(Item("a", 2)))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.wait([leaving])
        queued = b.queued_cost
        third = asyncio.ensure_future(b.submit(Item("a", 3)))
        return await asyncio.gather(staying, third), queued

    answers, queued = run(work)
    assert queued == 1
    assert answers == [Batched(20, 2), Batched(30, 2)]
    assert recorder.numbers == [[2, 3]]


def test_a_caller_that_leaves_a_running_batch_does_not_break_it() -> None:
    """Cancelling one caller of a batch on the model leaves the other's answer alone."""
    recorder = Recorder(seconds=1)

    async def work() -> Batched[int]:
        b = batcher(recorder, max_items=2)
        leaving = asyncio.ensure_future(b.submit(Item("a", 1)))
        staying = asyncio.ensure_future(b.submit(Item("a", 2)))
        await asyncio.sleep(0.5)
        leaving.cancel()
        return await staying

    assert run(work) == Batched(20, 2)


def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    """A failing batch raises in each of its callers; the batcher goes on."""

    async def fails_on_a(items: Sequence[Item]) -> list[int]:
        if items[0].key == "a":
            raise ValueError("the model failed")
        return [item.number for item in items]

    async def work() -> list[Any]:
        b = batcher(fails_on_a)
        items = [Item("a", 1), Item("a", 2), Item("b", 3)]
        answers = await asyncio.gather(*(b.submit(item) for item in items), return_exceptions=True)
        return [*answers, await b.submit(Item("b", 4))]

    first, second, third, fourth = run(work)
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert (third, fourth) == (Batched(3, 1), Batched(4, 1))


def test_a_wrong_number_of_results_is_an_error() -> None:
    """A model that answers too few items fails the whole batch rather than leave somebody waiting."""

    async def forgets(items: Sequence[Item]) -> list[int]:
        return [0] * (len(items) - 1)

    async def work() -> list[Any]:
        b = batcher(forgets)
        return await asyncio.gather(b.submit(Item("a", 1)), b.submit(Item("a", 2)), return_exceptions=True)

    assert all(isinstance(answer, ServingError) for answer in run(work))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    """Past the bound `submit` raises Overloaded with the time that the queue will take; later it accepts again."""
    recorder = Recorder(seconds=6)

    async def work() -> tuple[int, Batched[int]]:
        b = batcher(recorder, max_items=1, max_queued_cost=3)
        await b.submit(Item("a", 0))
        tasks = [asyncio.ensure_future(b.submit(Item("a", n))) for n in range(1, 5)]
        await asyncio.sleep(0)  # one is on the model, three wait
        with pytest.raises(Overloaded) as refused:
            await b.submit(Item("b", 9))
        await asyncio.gather(*tasks)
        return refused.value.retry_after_s, await b.submit(Item("b", 10))

    retry_after_s, later = run(work)
    assert retry_after_s == 18  # three batches of six seconds
    assert later == Batched(100, 1)


def test_overloaded_survives_pickling() -> None:
    """The refusal crosses from a replica to the ingress with its message and its time."""
    error = pickle.loads(pickle.dumps(Overloaded("full", 7)))
    assert (str(error), error.retry_after_s) == ("full", 7)


arrivals = st.lists(
    st.tuples(
        st.floats(0, 3),  # seconds after the one before
        st.sampled_from("abc"),
        st.integers(1, 60),
        st.one_of(st.none(), st.floats(0, 5)),  # gives up after so many seconds
    ),
    max_size=25,
)


@given(arrivals=arrivals, seconds=st.floats(0.01, 3), max_items=st.integers(1, 5), workers=st.integers(1, 3))
def test_everybody_is_answered_within_the_limits(
    arrivals: list[tuple[float, str, int, float | None]], seconds: float, max_items: int, workers: int
) -> None:
    """Whatever arrives and gives up: every patient caller gets its own answer, and each batch keeps all limits."""
    recorder = Recorder(seconds=seconds)

    async def work() -> tuple[list[Any], int]:
        b = batcher(recorder, max_items=max_items, max_cost=100, max_queued_cost=10**6, workers=workers)

        async def patient(item: Item, patience: float | None) -> int | None:
            try:
                return (await asyncio.wait_for(b.submit(item), patience)).result
            except TimeoutError:
                return None

        tasks = []
        for number, (pause, key, cost, patience) in enumerate(arrivals):
            await asyncio.sleep(pause)
            tasks.append(asyncio.ensure_future(patient(Item(key, number, cost), patience)))
        answers = await asyncio.gather(*tasks)
        return answers, b.queued_cost

    answers, queued = run(work)
    assert queued == 0
    for number, answer in enumerate(answers):
        assert answer == 10 * number or (answer is None and arrivals[number][3] is not None)
    assert recorder.most_running <= workers
    for batch in recorder.batches:
        assert len({item.key for item in batch}) == 1
        assert len(batch) <= max_items
        assert len(batch) == 1 or sum(item.cost for item in batch) <= 100
    ran = [item.number for batch in recorder.batches for item in batch]
    assert len(ran) == len(set(ran))
