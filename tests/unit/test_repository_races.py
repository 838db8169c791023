"""Promotes and rollbacks at once, dead at any operation, on a store that fails: one wins, no reader sees a half."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sceneray import repository, retries, storage
from sceneray.errors import ConflictError, StorageError
from sceneray.storage import Committed
from tests.faulty_files import Died, FaultyStore, dies_at, fails_at, faulty_store
from tests.repositories import NAME, aliases, check_history, finish, promote, small
from tests.saving import PATIENCE_S
from tests.unit.test_two_writers import Turns, both


def test_racing_promotes_have_one_winner(any_root: str) -> None:
    """Of two that compared with the same champion exactly one moves it, each round, on every file system."""
    barrier = threading.Barrier(2, timeout=PATIENCE_S)
    won: list[list[int]] = [[], []]

    def race(writer: int) -> None:
        for turn in range(5):
            seen = repository.read(storage.join(any_root, "repo"), NAME)
            barrier.wait()
            version = f"{turn}-{writer}"
            try:
                finish(any_root, seen, small(any_root, version), version)
                won[writer].append(turn)
            except ConflictError:
                pass
            barrier.wait()

    both(lambda: race(0), lambda: race(1))
    assert sorted(won[0] + won[1]) == list(range(5))
    model = repository.read(storage.join(any_root, "repo"), NAME)
    check_history(model)
    winners = [f"{turn}-{0 if turn in won[0] else 1}" for turn in range(5)]
    assert [move["champion"]["version"] for move in model.history] == winners
    assert aliases(any_root) == [winners[-1], winners[-2]]
    assert len(model.versions) == 10


def whole_at_this_moment(files: dict[str, bytes]) -> None:
    """A reader that comes now finds a valid document, and whole bundles under both aliases."""
    document = json.loads(files[f"/top/repo/{NAME}/{repository.DOCUMENT}"])
    for alias in repository.ALIASES:
        named = document[alias]
        if named is not None:
            folder = f"/top/repo/{NAME}/{named['version']}"
            manifest = json.loads(files[f"{folder}/{storage.MANIFEST}"])
            assert Committed("", manifest).digest == named["digest"]
            assert all(len(files[f"{folder}/{name}"]) == entry["bytes"] for name, entry in manifest["files"].items())


def let_two_promote(order: Iterator[int], versions: tuple[str, str], roll_back: bool = False) -> tuple[int, int]:
    """Two promotes of other contents (or a promote and a rollback), their operations in this order.

    Of those that saw the same state one moved; who lost was told so; and both aliases name whole bundles throughout.
    Returns how many operations that took, and how many lost.
    """
    turns = Turns(order)
    with faulty_store() as store, pytest.MonkeyPatch.context() as patch:
        root = store.url("top")
        for version in ("1", "2"):
            promote(root, version)
        sources = [small(root, versions[number], f"by-{number}") for number in range(2)]
        won: list[int] = []
        lost: list[int] = []
        count = 0

        def look() -> None:
            nonlocal count
            turns.wait()
            whole_at_this_moment(store.content())
            count += 1

        def act(number: int) -> None:
            turns.start(number)
            seen = repository.read(storage.join(root, "repo"), NAME)
            try:
                if number == 1 and roll_back:
                    assert repository.rollback(storage.join(root, "repo"), NAME).moves > seen.moves
                else:
                    finish(root, seen, sources[number], versions[number])
                    won.append(seen.moves)
            except ConflictError:
                lost.append(number)
            finally:
                turns.end()

        patch.setattr(storage, "_MEMORY_LOCK", turns)
        store.gate = look
        both(lambda: act(0), lambda: act(1))
        store.gate = lambda: None
        whole_at_this_moment(store.content())
        model = repository.read(storage.join(root, "repo"), NAME)
        check_history(model)
        assert 2 - len(lost) == model.moves - 2
        assert len(lost) < 2
        if not roll_back:
            assert len(set(won)) == len(won)
        return count, len(lost)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("versions", "roll_back"),
    [(("3", "4"), False), (("3", "3"), False), (("3", "4"), True)],
    ids=["two-versions", "one-version", "rollback"],
)
def test_a_promote_may_begin_at_any_operation_of_another(
    first: int, versions: tuple[str, str], roll_back: bool
) -> None:
    """Wherever one is halted while the other one runs to its end, at least one wins and no reader sees a half."""
    total, _ = let_two_promote(itertools.repeat(first), versions, roll_back)
    assert total > 20
    losers = set()
    for number in range(1, total):
        order = itertools.chain(itertools.repeat(first, number), itertools.repeat(1 - first))
        losers.add(let_two_promote(order, versions, roll_back)[1])
    assert losers == ({1} if versions[0] == versions[1] else {0, 1})


@examples(max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=12),
    st.sampled_from([("3", "4"), ("3", "3")]),
    st.booleans(),
)
def test_no_interleaving_gives_two_winners(lengths: list[int], versions: tuple[str, str], roll_back: bool) -> None:
    """The same where the two take turns of any length."""
    runs = (itertools.repeat(number % 2, length) for number, length in enumerate(lengths))
    let_two_promote(itertools.chain.from_iterable(runs), versions, roll_back)


@pytest.fixture
def store() -> Iterator[FaultyStore]:
    """A store with a champion and a previous that fails as it is told."""
    with faulty_store() as faulty:
        for version in ("1", "2"):
            promote(faulty.url("top"), version)
        small(faulty.url("top"), "3")
        yield faulty


def operations_of(store: FaultyStore, action: Any) -> Iterator[tuple[int, str]]:
    """Each operation of `action` and each moment of it; the store is as before at each."""
    before = store.content()
    store.restart(before)
    action()
    count = len(store.operations)
    assert count > 5
    for number, moment in itertools.product(range(1, count + 1), ("before", "after")):
        store.restart(before)
        yield number, moment


def test_a_promote_that_dies_anywhere_leaves_the_old_or_the_new(store: FaultyStore) -> None:
    """Dead before or after each operation: both aliases are the old ones or the new ones, whole; a repeat finishes."""
    root, outcomes = store.url("top"), set()
    for number, moment in operations_of(store, lambda: promote(root, "3")):
        store.rules = [dies_at(number, moment)]
        with pytest.raises(Died):
            promote(root, "3")
        store.rules.clear()
        found = aliases(root)
        assert found in (["2", "1"], ["3", "2"])
        outcomes.add(found[0])
        promote(root, "3")
        assert aliases(root) == ["3", "2"]
        check_history(repository.read(store.url("top", "repo"), NAME))
    assert outcomes == {"2", "3"}


def test_a_rollback_that_dies_anywhere_leaves_the_old_or_the_new(store: FaultyStore) -> None:
    """Dead before or after each operation of a rollback, champion and previous never name the same bundle."""
    outcomes = set()
    for number, moment in operations_of(store, lambda: repository.rollback(store.url("top", "repo"), NAME)):
        store.rules = [dies_at(number, moment)]
        with pytest.raises(Died):
            repository.rollback(store.url("top", "repo"), NAME)
        store.rules.clear()
        outcomes.add(tuple(aliases(store.url("top"))))
    assert outcomes == {("2", "1"), ("1", "2")}


@pytest.mark.parametrize("attempts", [retries.ATTEMPTS, 1])
def test_a_fault_anywhere_is_asked_again_or_told(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    """One failed or unanswered operation delays a promote; where asking again is given up, the repeat promotes."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(retries, "ATTEMPTS", attempts)
    root = store.url("top")
    for number, moment in operations_of(store, lambda: promote(root, "3")):
        store.rules = [fails_at(number, moment)]
        with contextlib.suppress(StorageError) if attempts == 1 else contextlib.nullcontext():
            promote(root, "3")
        # A read that finds no file ends there: nothing comes after it.
        assert store.raised.total() == 1 or moment == "after"
        store.rules.clear()
        promote(root, "3")
        assert aliases(root) == ["3", "2"]
        check_history(repository.read(store.url("top", "repo"), NAME))
