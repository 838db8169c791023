"""A real S3 server behind a proxy that fails: what was acknowledged is there, and no conflict is a false one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from sceneray import checkpoint, retention, retries, saver, storage
from sceneray.errors import ConflictError
from tests.fault_proxy import KINDS, FaultProxy, Request, at_endpoint
from tests.saving import PATIENCE_S, save_settings, saving, snapshot, take_snapshot, wait_for
from tests.support import POLL_S, seaweed

MIB = 2**20
# s3fs drops the connection of an answer that was cut short without closing it.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")


@pytest.fixture
def retried(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often storage.py asked again so far."""
    caplog.set_level(logging.INFO, "sceneray.retries")
    return lambda: sum(record.name == "sceneray.retries" and "attempt" in record.message for record in caplog.records)


def to_object(ending: str, method: str = "PUT") -> Callable[[Request], bool]:
    """True for requests of `method` for an object whose key ends so."""
    return lambda request: request.method == method and request.path.partition("?")[0].endswith(ending)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_survived(
    proxy: FaultProxy, root: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request of a write, a create, a swap, a read, a listing and a removal may fail once, in whatever way."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    url = storage.join(root, "file")

    def failing_once(action: Callable[[], Any]) -> Any:
        proxy.plan(kind, lambda _: True)
        return action()

    for turn in (b"1", b"2"):
        failing_once(lambda turn=turn: storage.write_bytes(url, turn))
        assert failing_once(lambda: storage.read_bytes(url)) == turn
    failing_once(lambda: storage.create(storage.join(root, "new"), b"n"))
    failing_once(lambda: storage.compare_and_swap(url, storage.etag(url), b"3"))
    assert failing_once(lambda: storage.list_names(root)) == ["file", "new"]
    assert failing_once(lambda: storage.exists(url))
    assert failing_once(lambda: storage.read_bytes(url)) == b"3"
    failing_once(lambda: storage.remove(root))
    assert storage.list_names(root) == []
    assert proxy.counts == {kind: 10}


def test_a_large_answer_cut_short_is_asked_again(proxy: FaultProxy, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the client reads in several requests comes whole although one of its answers ends in the middle."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    url = storage.join(root, "large")
    data = random.Random(1).randbytes(51 * MIB)  # s3fs reads in pieces of 50 MiB, and does not ask again for those
    storage.write_bytes(url, data)
    proxy.plan("cut", to_object("/large", "GET"))
    assert hashlib.sha256(storage.read_bytes(url)).digest() == hashlib.sha256(data).digest()
    assert proxy.counts == {"cut": 1}


def test_a_lost_answer_is_no_conflict(proxy: FaultProxy, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditional put that took effect and whose answer never came is known again as one's own, every time."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    url = storage.join(root, "last")
    proxy.plan("lost", to_object("/last"))
    storage.create(url, b"0")
    for turn in range(1, 4):
        proxy.plan("lost", to_object("/last"))
        storage.compare_and_swap(url, storage.etag(url), str(turn).encode())
        assert storage.read_bytes(url) == str(turn).encode()
    proxy.plan("lost", to_object("/last"))
    assert checkpoint.point(storage.join(root, "run"), "last", "step", snapshot(1).state)
    assert proxy.counts == {"lost": 5}
    proxy.plan("lost", to_object("/last"))
    with pytest.raises(ConflictError):
        storage.compare_and_swap(url, '"another"', b"x")  # a true conflict stays one
    assert storage.read_bytes(url) == b"3"


def test_a_held_request_tells_when_it_is_there(proxy: FaultProxy, root: str) -> None:
    """Between the last file and the manifest there is no checkpoint; once the manifest is let through there is."""
    run = storage.join(root, "run")
    settings = save_settings(run)
    with saving(settings) as worker, proxy.hold(to_object("/manifest.json")) as hold:
        take_snapshot(worker, 1)
        assert hold.arrived.wait(PATIENCE_S)
        assert len(storage.walk_files(storage.join(run, checkpoint.name_of(1, 1)))) == 5
        assert checkpoint.newest(run, print) is None
        hold.released.set()
        worker.finish()
        assert checkpoint.load(storage.join(run, "last")).step == 1


def test_one_request_in_ten_fails(
    proxy: FaultProxy,
    root: str,
    retried: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under faults of every kind, folders, counters and 20 checkpoints end as they would without."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.02)
    proxy.share = 0.1
    for number in range(5):
        files = {name: f"{number} {name}".encode() * 100 for name in "abc"}
        url = storage.join(root, "folders", str(number))
        storage.commit(url, files, {"format": "test", "version": 1}, verify=True)
        opened = storage.open_committed(url)
        assert opened is not None
        assert {name: opened.read(name) for name in files} == files
    assert storage.list_names(storage.join(root, "folders")) == [str(number) for number in range(5)]
    run = storage.join(root, "run")
    settings = save_settings(run, keep=30)
    with saving(settings) as worker:
        for step in range(1, 21):
            take_snapshot(worker, step, step / 100)
            worker.finish()
            assert worker.saved is not None
            assert worker.saved.step == step
    proxy.share = 0.0
    entries = retention.entries(run)
    assert [entry.step for entry in entries if entry.committed is not None] == list(range(1, 21))
    for entry in entries:
        assert checkpoint.load(storage.join(run, entry.name)).step == entry.step
    assert {checkpoint.load(storage.join(run, pointer)).step for pointer in ("last", "best")} == {20}
    assert set(proxy.counts) == set(KINDS)
    assert retried() > 0
    with capsys.disabled():
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(proxy.counts.items()))
        print(f"\n{proxy.requests} requests; faults: {faults}; storage.py asked again {retried()} times")


def test_writers_count_up_under_faults(proxy: FaultProxy, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers that count up by compare-and-swap lose and double no step although answers are lost."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    url = storage.join(root, "counter")
    storage.create(url, b"0")
    proxy.share, proxy.kinds = 0.15, ("lost", "reset", "503")
    errors: list[BaseException] = []

    def count_up() -> None:
        try:
            done = 0
            while done < 8:
                tag = storage.etag(url)
                value = int(storage.read_bytes(url))
                with contextlib.suppress(ConflictError):
                    storage.compare_and_swap(url, tag, str(value + 1).encode())
                    done += 1
        except BaseException as error:  # noqa: BLE001  raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=count_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.share = 0.0
    assert errors == []
    assert storage.read_bytes(url) == b"16"
    assert proxy.counts["lost"] > 0


def test_a_store_that_cannot_be_reached_is_waited_for(
    proxy: FaultProxy, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While connections are refused snapshots are taken; once the store is back the newest is committed."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(saver, "FIRST_WAIT_S", 0.05)
    run = storage.join(root, "run")
    with saving(save_settings(run)) as worker:
        take_snapshot(worker, 1)
        worker.finish()
        proxy.go_away()
        take_snapshot(worker, 2)
        wait_for(lambda: worker.faults > 0)
        take_snapshot(worker, 3)
        proxy.come_back()
        worker.finish()
    assert worker.faults > 0
    assert checkpoint.load(storage.join(run, "last")).step == 3


def outage(folder: Path, seconds: float) -> None:
    """Stop an S3 server while a run saves, start it again `seconds` later, and look at what there is.

    It takes some 3 s more until it answers again.
    """
    with seaweed(folder) as server, at_endpoint(server.endpoint, **server.environment):
        s3fs.S3FileSystem().mkdir(server.bucket)
        run = server.url("run")
        with saving(save_settings(run, keep=9)) as worker:
            take_snapshot(worker, 1, 0.1)
            worker.finish()
            server.server.stop()
            back_at, step = time.monotonic() + seconds, 1
            while time.monotonic() < back_at or worker.faults == 0:
                step += 1
                take_snapshot(worker, step)  # returns, though nobody answers
                time.sleep(POLL_S)
            assert worker.saved is not None
            assert worker.saved.step == 1
            server.server.start()
            worker.finish()
            take_snapshot(worker, step + 1)
            worker.finish()
        warnings: list[str] = []
        newest = checkpoint.newest(run, warnings.append)
        assert newest is not None
        assert newest.step == step + 1
        assert warnings == []
        committed = [entry.step for entry in retention.entries(run) if entry.committed is not None]
        assert committed[0] == 1
        assert committed[-2:] == [step, step + 1]
        assert checkpoint.load(storage.join(run, "best")).step == 1


@pytest.mark.chaos
def test_a_server_that_stops_for_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 server is ended and back after 10 s: training was not held, and the newest state is committed."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.1)
    outage(tmp_path, 7)


@pytest.mark.chaos
def test_a_server_that_stops_for_thirty_seconds(tmp_path: Path) -> None:
    """As above for 30 s, which is longer than one file is asked for."""
    outage(tmp_path, 30)
