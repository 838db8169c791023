"""The node's copies of shards: each is fetched once, verified, and kept as an Arrow file that is memory-mapped.

Parquet has to be decoded a row group at a time; an uncompressed Arrow IPC file is the same table laid out so that any
row is one page fault away. All processes of a node share a copy through the page cache. A copy is named by the
shard's sha256, so a changed store never meets an old copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sceneray import storage
from sceneray.errors import StorageError
from sceneray.retries import patiently

DEFAULT_LIMIT_GB = 50.0
# An Arrow file is a little larger than its Parquet shard (64-bit offsets, padding).
GROWTH = 1.05
SPARE_BYTES = 16 * 2**20  # left free on the disk
FETCHES = 3
OPENS = 3


class ShardCache:
    """A folder of at most `limit_gb` (10⁹ bytes) with the shards read last; default ~/.cache/sceneray/shards."""

    def __init__(self, folder: str | None = None, limit_gb: float = DEFAULT_LIMIT_GB, patience_s: float = 0.0) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else default_folder()
        self.limit_bytes = int(limit_gb * 1e9)
        self.patience_s = patience_s  # how long a store that cannot be reached is asked again

    def fetch(self, shard_url: str, sha256: str, size: int) -> Path:
        """The Arrow file of the shard at `shard_url`, which has `size` bytes and digest `sha256`; fetched if absent.

        Raises StorageError where it cannot be read, differs from its digest, or finds no room.
        """
        path = self._path(sha256)
        if not path.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / f"{sha256}.lock"):
                    if not path.exists():  # another process of this node may have been first
                        self._make_room(shard_url, int(size * GROWTH) + 4096, keep=path)
                        self._write(path, _download(shard_url, sha256, size, self.patience_s))
            except OSError as error:
                raise StorageError(
                    f"the shard cache at {self.folder} cannot be written: {error.strerror or error}. "
                    "Set data.cache to a writable folder."
                ) from error
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use, which eviction goes by
        return path

    def open(self, shard_url: str, sha256: str, size: int) -> pa.Table:
        """The shard's table, memory-mapped: nothing is read before it is asked for."""
        problem: Exception | None = None
        for _ in range(OPENS):
            path = self.fetch(shard_url, sha256, size)
            try:
                with pa.memory_map(str(path)) as file:
                    return pa.ipc.open_file(file).read_all()
            except FileNotFoundError as error:  # evicted by another process between the two lines
                problem = error
            except pa.ArrowInvalid as error:  # a disk fault in the copy
                problem = error
                path.unlink(missing_ok=True)
        raise StorageError(
            f"the copy of {shard_url} in {self.folder} cannot be opened: {problem}. Is data.cache_gb too small?"
        )

    def holds(self, sha256: str) -> bool:
        """True where a copy of this shard lies in the folder now."""
        return self._path(sha256).exists()

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.arrow"

    def _make_room(self, shard_url: str, needed: int, keep: Path) -> None:
        """Evict what was used longest ago until `needed` bytes fit into the limit and onto the disk."""
        if needed > self.limit_bytes:
            raise StorageError(
                f"the shard cache may hold {self.limit_bytes / 1e9:.3g} GB, but {shard_url} alone needs "
                f"{needed / 1e9:.3g} GB. Raise data.cache_gb, or prepare the store with smaller shards (--shard-mb)."
            )
        with FileLock(self.folder / "evict.lock"):
            self._drop_leftovers()
            copies = sorted(self._copies(), key=lambda copy: copy[2])
            held = sum(size for _, size, _ in copies)
            for path, size, _ in copies:
                if held + needed <= self.limit_bytes and self._free() >= needed + SPARE_BYTES:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    held -= size
            free = self._free()
        if free < needed + SPARE_BYTES:
            raise StorageError(
                f"the shard cache at {self.folder} needs {needed / 1e6:.0f} MB for {shard_url}, but its disk has only "
                f"{free / 1e6:.0f} MB free. Free some, or set data.cache to a folder on a larger disk."
            )

    def _copies(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of every copy."""
        found = []
        for path in self.folder.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((path, stat.st_size, stat.st_mtime))
        return found

    def _drop_leftovers(self) -> None:
        """Half-written files of processes that were killed an hour ago or more."""
        for path in self.folder.glob(".tmp-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - 3600:
                    path.unlink()

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _write(self, path: Path, data: bytes) -> None:
        """Parquet bytes as an Arrow file at `path`: whole, or not there."""
        parquet = pq.ParquetFile(pa.BufferReader(data))
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
                    for group in range(parquet.num_row_groups):
                        writer.write_table(parquet.read_row_group(group))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/sceneray/shards`, else `~/.cache/sceneray/shards`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sceneray" / "shards"


def _download(url: str, sha256: str, size: int, patience_s: float) -> bytes:
    """The bytes at `url`, once more where they differ from their digest."""
    for _ in range(FETCHES):
        try:
            data = patiently(f"reading {url}", lambda: storage.read_bytes(url), patience_s)
        except FileNotFoundError as error:
            raise StorageError(f"{url} is in the store's manifest but is missing: prepare the store again.") from error
        if len(data) == size and hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise StorageError(
        f"{url} is damaged: {len(data)} bytes with another sha256 than the manifest's ({size} bytes). "
        "Restore it from a copy, or prepare the store again."
    )
