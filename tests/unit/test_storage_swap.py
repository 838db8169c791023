"""Create-only and compare-and-swap of storage.py: of several writers exactly one wins."""

from __future__ import annotations

import multiprocessing
import threading
import uuid
from collections.abc import Callable

import pytest

from sceneray import retries, storage
from sceneray.errors import ConflictError, StorageError


def race(count: int, act: Callable[[int], None]) -> list[int]:
    """Let `count` threads act at once; those that did not lose with a ConflictError."""
    barrier = threading.Barrier(count)
    winners: list[int] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            act(number)
        except ConflictError:
            return
        winners.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def create_in_process(url: str, data: bytes, go: object, won: object) -> None:
    """Wait for the start signal, create, and tell the parent whether it was us."""
    go.wait()
    try:
        storage.create(url, data)
        won.put(True)
    except ConflictError:
        won.put(False)


def test_create_refuses_what_exists(any_root):
    """The second `create` of a name is a conflict, and the first content stays."""
    url = storage.join(any_root, "claim")
    storage.create(url, b"first")
    with pytest.raises(ConflictError):
        storage.create(url, b"second")
    assert storage.read_bytes(url) == b"first"


def test_compare_and_swap(any_root):
    """A swap succeeds with the current tag and is a conflict with an old one or with none."""
    url = storage.join(any_root, "pointer")
    storage.compare_and_swap(url, None, b"1")
    first = storage.etag(url)
    storage.compare_and_swap(url, first, b"2")
    for stale in (first, None):
        with pytest.raises(ConflictError):
            storage.compare_and_swap(url, stale, b"3")
    assert storage.read_bytes(url) == b"2"
    with pytest.raises(ConflictError):
        storage.compare_and_swap(storage.join(any_root, "absent"), first, b"3")


@pytest.mark.parametrize("same", [True, False], ids=["same-bytes", "other-bytes"])
def test_exactly_one_thread_creates(any_root, same):
    """Of threads that create one name at once exactly one wins, also where all write the same bytes."""
    url = storage.join(any_root, "race")
    winners = race(8, lambda number: storage.create(url, b"x" if same else str(number).encode()))
    assert len(winners) == 1
    assert storage.read_bytes(url) == (b"x" if same else str(winners[0]).encode())


def test_exactly_one_process_creates(tmp_path):
    """Of processes that create one file at once exactly one wins."""
    context = multiprocessing.get_context("spawn")
    go, won = context.Event(), context.Queue()
    url = str(tmp_path / "race")
    workers = [context.Process(target=create_in_process, args=(url, b"same", go, won)) for _ in range(3)]
    for worker in workers:
        worker.start()
    go.set()
    results = [won.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(results) == [False, False, True]


def test_swaps_lose_no_update(any_root):
    """Counting up by read and swap from several threads ends at the number of successful swaps."""
    url = storage.join(any_root, "counter")
    storage.create(url, b"0")

    def count_up(_: int) -> None:
        for _ in range(5):
            done = False
            while not done:
                tag = storage.etag(url)
                value = int(storage.read_bytes(url))
                try:
                    storage.compare_and_swap(url, tag, str(value + 1).encode())
                    done = True
                except ConflictError:
                    continue

    assert len(race(3, count_up)) == 3
    assert storage.read_bytes(url) == b"15"


def test_a_lost_answer_is_no_conflict(weed_server, monkeypatch):
    """A conditional put whose answer was lost is known again as our own when it is tried a second time."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    url = weed_server.url(uuid.uuid4().hex, "pointer")
    fs, _ = storage.filesystem(url)
    real = fs.pipe_file

    def put_then_lose_the_answer(path, data, **options):
        real(path, data, **options)
        raise OSError("connection reset after the put")

    monkeypatch.setattr(fs, "pipe_file", put_then_lose_the_answer)
    storage.create(url, b"ours")
    assert storage.read_bytes(url) == b"ours"


def test_no_compare_and_swap_without_a_known_way(tmp_path):
    """A file system without a known atomic swap is refused by name instead of being trusted."""
    with pytest.raises(StorageError, match="no compare-and-swap is known"):
        storage.create(f"dir::file://{tmp_path}/x", b"x")
