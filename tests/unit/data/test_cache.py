"""The node's shard copies: fetched once, verified, bounded, shared by processes."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sceneray import storage
from sceneray.data import cache as module
from sceneray.data.cache import ShardCache, default_folder
from sceneray.errors import StorageError
from tests.support import ROOT

Usage = namedtuple("Usage", "total used free")
SIZE = 40_000  # bytes of the one cell of a shard


class Shard:
    """A Parquet file of one row at a URL, with what a manifest says of it."""

    def __init__(self, root: Path, number: int) -> None:
        file = io.BytesIO()
        self.cell = bytes([number]) * SIZE
        pq.write_table(pa.table({"image": pa.array([self.cell], pa.large_binary())}), file, compression="NONE")
        data = file.getvalue()
        self.url = str(root / f"shard-{number}.parquet")
        storage.write_bytes(self.url, data)
        self.what = (self.url, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Five shards of about 40 kB, each larger than that as Parquet or Arrow by little."""
    return [Shard(tmp_path / "store", number) for number in range(5)]


def held(cache: ShardCache) -> set[str]:
    """Digests of the copies in the folder."""
    return {path.stem for path in cache.folder.glob("*.arrow")}


def test_a_shard_is_fetched_once(tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fetch reads nothing from the store, in this cache object or in another one on the same folder."""
    reads = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda url: reads.append(url) or real(url))
    paths = {ShardCache(str(tmp_path / "cache"), 1).fetch(*shards[0].what) for _ in range(3)}
    assert len(paths) == 1
    assert reads == [shards[0].url]


def test_the_copy_is_an_uncompressed_arrow_file(tmp_path: Path, shards: list[Shard]) -> None:
    """Arrow itself opens the copy, and the cell's bytes lie in the file as they are."""
    path = ShardCache(str(tmp_path / "cache"), 1).fetch(*shards[3].what)
    with pa.memory_map(str(path)) as file:
        assert pa.ipc.open_file(file).read_all().column("image")[0].as_py() == shards[3].cell
    assert shards[3].cell in path.read_bytes()


def test_the_longest_unused_copy_goes_first(tmp_path: Path, shards: list[Shard]) -> None:
    """With room for three, a fourth shard evicts the one that was used longest ago, not the one fetched first."""
    cache = ShardCache(str(tmp_path / "cache"), 3.4 * SIZE / 1e9)
    for age, shard in zip((50, 40, 30), shards, strict=False):
        os.utime(cache.fetch(*shard.what), (1e9 - age, 1e9 - age))
    cache.fetch(*shards[0].what)  # used again
    cache.fetch(*shards[3].what)
    assert held(cache) == {shards[i].what[1] for i in (0, 2, 3)}
    assert sum(path.stat().st_size for path in cache.folder.glob("*.arrow")) <= cache.limit_bytes


def test_an_open_table_outlives_its_eviction(tmp_path: Path, shards: list[Shard]) -> None:
    """A process that has a shard open reads on after another one evicted it."""
    cache = ShardCache(str(tmp_path / "cache"), 1.4 * SIZE / 1e9)
    table = cache.open(*shards[0].what)
    cache.fetch(*shards[1].what)
    assert not cache.holds(shards[0].what[1])
    assert table.column("image")[0].as_py() == shards[0].cell


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path, shards: list[Shard]) -> None:
    """The message names both sizes' settings, and nothing is evicted for it."""
    with pytest.raises(StorageError, match=r"Raise data.cache_gb, or .*--shard-mb"):
        ShardCache(str(tmp_path / "cache"), 0.5 * SIZE / 1e9).fetch(*shards[0].what)


def test_free_space_is_checked_before_the_fetch(
    tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk old copies go, and if that is not enough nothing is downloaded and the error says what to do."""
    cache = ShardCache(str(tmp_path / "cache"), 1)
    cache.fetch(*shards[0].what)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(StorageError, match=r"its disk has only 0 MB free.*set data.cache to a folder on a larger disk"):
        cache.fetch(*shards[1].what)
    assert held(cache) == set()


def test_a_damaged_download_is_tried_again(
    tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad read is repeated; bytes that stay different are refused and leave no copy."""
    real, reads = storage.read_bytes, []

    def flaky(url: str) -> bytes:
        reads.append(url)
        return real(url) if len(reads) > 1 else real(url)[:-1] + b"?"

    monkeypatch.setattr(storage, "read_bytes", flaky)
    cache = ShardCache(str(tmp_path / "cache"), 1)
    assert cache.open(*shards[0].what).column("image")[0].as_py() == shards[0].cell
    assert len(reads) == 2
    monkeypatch.setattr(storage, "read_bytes", lambda url: real(url)[:-1])
    with pytest.raises(StorageError, match=r"shard-1.parquet is damaged: .* another sha256"):
        cache.fetch(*shards[1].what)
    assert held(cache) == {shards[0].what[1]}


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, shards: list[Shard]) -> None:
    """A copy that a disk fault cut short is replaced, not read."""
    cache = ShardCache(str(tmp_path / "cache"), 1)
    path = cache.fetch(*shards[0].what)
    path.write_bytes(path.read_bytes()[:100])
    assert cache.open(*shards[0].what).column("image")[0].as_py() == shards[0].cell


def test_a_failed_write_leaves_nothing(tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk fills up in spite of the check, no half copy stays and the error names the folder."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    cache = ShardCache(str(tmp_path / "cache"), 1)
    with pytest.raises(StorageError, match=r"cache cannot be written: No space left"):
        cache.fetch(*shards[0].what)
    assert not list(cache.folder.glob("*.arrow"))
    assert not list(cache.folder.glob(".tmp-*"))


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path, shards: list[Shard]) -> None:
    """A cache below a file is an error that names the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Set data.cache to a writable folder"):
        ShardCache(str(tmp_path / "file" / "cache"), 1).fetch(*shards[0].what)


FETCH = """
import sys
from sceneray import storage
from sceneray.data.cache import ShardCache

real = storage.read_bytes
storage.read_bytes = lambda url: print("read", url) or real(url)
print("ready", flush=True)
sys.stdin.readline()
folder, url, sha256, size = sys.argv[1:]
assert ShardCache(folder, 1).open(url, sha256, int(size)).num_rows == 1
"""


def test_processes_of_a_node_fetch_a_shard_once(tmp_path: Path, shards: list[Shard]) -> None:
    """Two processes that want a shard at the same moment read the store once."""
    url, sha256, size = shards[0].what
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), url, sha256, str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs) == f"read {url}\n"


def test_the_default_folder_follows_the_desktop_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """$XDG_CACHE_HOME if it is set, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/disk")
    assert default_folder() == Path("/big/disk/sceneray/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "sceneray" / "shards"
