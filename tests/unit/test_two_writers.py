"""Two writers of one run at once: one wins, the other one learns it, and the run never goes back."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sceneray import checkpoint, saver, storage
from sceneray.config import TrainSettings
from sceneray.errors import ConflictError, StorageError, SupersededError
from tests.faulty_files import faulty_store
from tests.saving import PATIENCE_S, save_settings, snapshot


def publish(settings: TrainSettings, step: int, attempt: int = 1, miou: float | None = None) -> str:
    """Save a checkpoint of `step`."""
    return saver.publish(settings.run, snapshot(step, attempt, miou), settings)


def content(run: str) -> dict[str, bytes]:
    """Every file of a run."""
    return {name: storage.read_bytes(storage.join(run, name)) for name, _ in storage.walk_files(run)}


def test_a_lower_attempt_moves_and_removes_nothing(any_root: str) -> None:
    """A worker group that was given up and still runs is told so at its first save, and changes nothing of the run."""
    settings = save_settings(storage.join(any_root, "run"), keep=9)
    for step, attempt, miou in [(1, 1, 0.9), (2, 1, 0.5), (3, 2, 0.95)]:
        publish(settings, step, attempt, miou)
    before = content(settings.run)
    for step in (4, 5):
        with pytest.raises(SupersededError, match="a later attempt has taken over"):
            publish(settings, step, attempt=1, miou=0.99)
        assert checkpoint.prune(settings.run, 1, attempt=1) == []
    after = content(settings.run)
    own = {path for path in after if "-a001/" in path and ("step-00000004" in path or "step-00000005" in path)}
    assert {path: data for path, data in after.items() if path not in own} == before


def test_two_writers_race_for_a_pointer(any_root: str) -> None:
    """Of two writers that swap one pointer at once exactly one wins each round, and the other one learns it."""
    url = storage.join(any_root, "last")
    barrier = threading.Barrier(2, timeout=PATIENCE_S)
    won: list[list[int]] = [[], []]

    def swap(writer: int) -> None:
        for turn in range(10):
            tag = storage.etag(url)
            barrier.wait()  # both have read the same tag
            try:
                storage.compare_and_swap(url, tag, f"{turn} {writer}".encode())
                won[writer].append(turn)
            except ConflictError:
                pass
            barrier.wait()
            assert storage.read_bytes(url) == f"{turn} {0 if turn in won[0] else 1}".encode()
            barrier.wait()

    both(lambda: swap(0), lambda: swap(1))
    assert sorted(won[0] + won[1]) == list(range(10))


def test_two_attempts_race_for_last(any_root: str) -> None:
    """However two attempts interleave, `last` ends on the higher one's newest checkpoint; the lower one is told."""
    told: list[bool] = []

    def lower() -> None:
        told.extend(checkpoint.point(any_root, "last", f"low-{n}", snapshot(n, 1).state) for n in range(10))

    def higher() -> None:
        assert all(checkpoint.point(any_root, "last", f"high-{n}", snapshot(n, 2).state) for n in range(10))

    both(lower, higher)
    assert storage.read_json(storage.join(any_root, "last"))["checkpoint"] == "high-9"
    assert told == sorted(told, reverse=True)  # once told that it is superseded, always


class Turns:
    """Lets two threads go on one operation at a time, in a given order; a compare-and-swap is one operation.

    It stands in for storage.py's lock of files in memory, so that it knows when a thread is within a swap.
    """

    def __init__(self, order: Iterator[int]) -> None:
        self.order = order
        self.running = {0, 1}
        self.turn: int | None = None
        self.known = threading.local()
        self.changed = threading.Condition()

    def start(self, number: int) -> None:
        """This thread is number 0 or 1 from now on."""
        self.known.number, self.known.within, self.known.has_turn = number, 0, False

    def wait(self) -> None:
        """End this thread's turn, and return when it has the next one. Other threads pass."""
        number = getattr(self.known, "number", None)
        if number is None or self.known.within:
            return
        with self.changed:
            if self.known.has_turn:
                self._next()
            if self.turn is None:
                self._next()
            assert self.changed.wait_for(lambda: self.turn == number, PATIENCE_S)
            self.known.has_turn = True

    def end(self) -> None:
        """This thread takes no more turns."""
        with self.changed:
            self.running.discard(self.known.number)
            if self.turn == self.known.number or self.turn is None:
                self._next()

    def _next(self) -> None:
        drawn = next(self.order, 0)
        self.turn = drawn if drawn in self.running else min(self.running, default=None)
        self.changed.notify_all()

    def __enter__(self) -> None:
        self.wait()
        self.known.within = getattr(self.known, "within", 0) + 1

    def __exit__(self, *_: object) -> None:
        self.known.within -= 1


def let_two_attempts_save(order: Iterator[int], miou: float = 0.95) -> int:
    """Two attempts save two checkpoints each, their operations in this order; how many operations that took.

    Once `last` is on the higher one's checkpoint, there it must stay; what either pointer names must be whole at every
    moment; and a later reader must go on from the higher one's newest.
    """
    turns = Turns(order)
    with faulty_store() as store, pytest.MonkeyPatch.context() as patch:
        settings = save_settings(store.url("run"), keep=1)
        publish(settings, 1, miou=0.5)
        seen: list[int] = []

        def look() -> None:
            turns.wait()
            files = store.content()
            for pointer in ("last", "best"):
                now = json.loads(files[f"/run/{pointer}"])
                manifest = json.loads(files[f"/run/{now['checkpoint']}/{storage.MANIFEST}"])
                assert all(f"/run/{now['checkpoint']}/{name}" in files for name in manifest["files"])
            seen.append(json.loads(files["/run/last"])["attempt"])

        def save_twice(attempt: int) -> None:
            turns.start(attempt - 1)
            # The higher one may clear away what the lower one is writing.
            allowed = (SupersededError, StorageError) if attempt == 1 else ()
            try:
                with contextlib.suppress(*allowed):
                    for step in (2, 3):
                        publish(settings, step, attempt, miou + attempt / 100)
            finally:
                turns.end()

        patch.setattr(storage, "_MEMORY_LOCK", turns)
        store.gate = look
        both(lambda: save_twice(1), lambda: save_twice(2))
        store.gate = lambda: None
        assert seen == sorted(seen)
        damage: list[str] = []
        newest = checkpoint.newest(settings.run, damage.append)
        last = checkpoint.load(storage.join(settings.run, "last"))
        assert damage == []
        assert newest is not None
        assert (newest.step, last.step, last.state["attempt"]) == (3, 3, 2)
        return len(seen)


@pytest.mark.parametrize("first", [0, 1], ids=["lower-first", "higher-first"])
def test_an_attempt_may_begin_at_any_operation_of_another(first: int) -> None:
    """Wherever one attempt is halted and the other one saves and ends, `last` does not go back, and all is whole."""
    total = let_two_attempts_save(itertools.repeat(first))
    assert total > 40
    for number in range(1, total):
        let_two_attempts_save(itertools.chain(itertools.repeat(first, number), itertools.repeat(1 - first)))


@examples(max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=10), st.sampled_from([0.2, 0.95]))
def test_no_interleaving_of_two_attempts_moves_last_back(lengths: list[int], miou: float) -> None:
    """The same where the two take turns of any length."""
    runs = (itertools.repeat(number % 2, length) for number, length in enumerate(lengths))
    let_two_attempts_save(itertools.chain.from_iterable(runs), miou)


def both(*actions: Callable[[], None]) -> None:
    """Run the actions at the same time; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
