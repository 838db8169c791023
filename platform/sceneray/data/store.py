"""The dataset store: a folder of Parquet shards that a `manifest.json`, written last, commits.

    manifest.json                     format, version, layout, plan, classes, and the shards with rows, bytes, sha256
    plan.json                         what the store was made from (`sceneray.data.plan`); readers do not need it
    train-00000-of-00002.parquet      columns: name str, image large_binary (JPEG or PNG bytes),
    ...                               label large_binary (8-bit grey PNG of class ids), height, width int32

Plain Parquet without compression of its own (JPEG and PNG bytes do not shrink), so pandas, DuckDB, Ray Data and
Hugging Face `datasets` read it too. Training reads it through `ShardCache`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sceneray import storage
from sceneray.data.cache import ShardCache
from sceneray.data.images import decode_label
from sceneray.errors import DataError, StorageError, unknown_name

FORMAT = "sceneray-store"
VERSION = 1
IGNORE_INDEX = 255
PLAN = "plan.json"
# Readers of a part (Ray Data, DuckDB) fetch a row group at once: some dozens of photos, not one and not a shard.
ROW_GROUP_ROWS = 32
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("image", pa.large_binary()),
        ("label", pa.large_binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ClassInfo:
    """One class: its id in labels (0 .. number of classes - 1), its name, and its colour in pictures (RGB)."""

    id: int
    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """One photo with its label, still encoded: JPEG or PNG bytes, and an 8-bit grey PNG of class ids."""

    name: str
    image: bytes
    label: bytes
    height: int
    width: int


@dataclass(frozen=True)
class ShardInfo:
    """One written shard. `value_counts[v]` is the number of label pixels with the value v (0..255)."""

    file: str
    rows: int
    bytes: int
    sha256: str
    value_counts: tuple[int, ...]


def shard_name(split: str, index: int, total: int) -> str:
    """File name of shard `index` of `total`."""
    return f"{split}-{index:05d}-of-{total:05d}.parquet"


def write_shard(url: str, split: str, index: int, total: int, samples: Iterable[Sample]) -> ShardInfo:
    """Write one shard of the store at `url`; a reader sees the whole file or none."""
    rows = list(samples)
    counts = np.zeros(256, dtype=np.int64)
    for sample in rows:
        counts += np.bincount(decode_label(sample.label).ravel(), minlength=256)
    table = pa.Table.from_pylist([asdict(sample) for sample in rows], schema=SCHEMA)
    file = io.BytesIO()
    pq.write_table(
        table, file, row_group_size=ROW_GROUP_ROWS, compression="NONE", use_dictionary=False, write_statistics=False
    )
    data = file.getvalue()
    name = shard_name(split, index, total)
    storage.write_bytes(storage.join(url, name), data)
    return ShardInfo(name, len(rows), len(data), hashlib.sha256(data).hexdigest(), tuple(counts.tolist()))


def write_manifest(
    url: str, classes: Iterable[ClassInfo], splits: Mapping[str, Iterable[ShardInfo]], about: Mapping[str, Any]
) -> Store:
    """Commit the store at `url`: its shards become a store for readers. `about` (layout, plan, ...) is kept beside."""
    known = tuple(classes)
    manifest = {
        **about,
        "format": FORMAT,
        "version": VERSION,
        "classes": [asdict(info) for info in known],
        "ignore_index": IGNORE_INDEX,
        "row_group_rows": ROW_GROUP_ROWS,
        "splits": {name: _split_entry(list(shards), len(known)) for name, shards in splits.items()},
    }
    storage.write_json(storage.join(url, storage.MANIFEST), manifest)
    return Store.open(url)


def _split_entry(shards: list[ShardInfo], classes: int) -> dict[str, Any]:
    counts = np.sum([shard.value_counts for shard in shards], axis=0)
    return {
        "rows": sum(shard.rows for shard in shards),
        "pixel_counts": counts[:classes].tolist(),
        "ignored_pixels": int(counts[IGNORE_INDEX]),
        "shards": [
            {"file": shard.file, "rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards
        ],
    }


class Store:
    """A committed dataset store. Made by `Store.open`."""

    def __init__(self, url: str, manifest: dict[str, Any]) -> None:
        self.url = url
        self.manifest = manifest
        self.classes = tuple(ClassInfo(c["id"], c["name"], (*c["color"],)) for c in manifest["classes"])
        self.ignore_index = int(manifest["ignore_index"])
        self.splits = tuple(manifest["splits"])
        self.digest = storage.Committed(url, manifest).digest

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at `url`.

        Raises DataError where there is none, where it was never finished, or where it is of another version.
        """
        url = storage.absolute(url)
        try:
            manifest = storage.read_json(storage.join(url, storage.MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            if storage.exists(storage.join(url, PLAN)):
                text = "was never finished: run the same `sceneray prepare` again, what is done is kept"
            else:
                text = (
                    "holds no dataset store: check the path, or write one with `sceneray prepare LAYOUT [SOURCE] STORE`"
                )
            raise DataError(f"{url} {text}.") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{url} is no dataset store: its manifest is not of the format '{FORMAT}'. Check the path.")
        if manifest.get("version") != VERSION:
            raise DataError(
                f"{url} is a dataset store of version {manifest.get('version')}; this sceneray reads version "
                f"{VERSION}. Prepare it again, or use the sceneray that wrote it."
            )
        try:
            return cls(url, manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the manifest of {url} is damaged ({error!r}): prepare the store again.") from error

    def rows(self, split: str) -> int:
        """Number of samples of a split."""
        return int(self._entry(split)["rows"])

    def shard_rows(self, split: str) -> list[int]:
        """Number of samples of each shard of a split, in order."""
        return [int(shard["rows"]) for shard in self._entry(split)["shards"]]

    def pixel_counts(self, split: str) -> NDArray[np.int64]:
        """Labelled pixels of each class in a split, int64 [number of classes]."""
        return np.array(self._entry(split)["pixel_counts"], dtype=np.int64)

    def split(self, name: str, cache: ShardCache | None = None) -> Split:
        """The samples of one split, read through `cache`.

        Raises DataError where the store has no such split or no sample in it.
        """
        entry = self._entry(name)
        if not entry["rows"]:
            raise DataError(f"the split '{name}' of {self.url} is empty: prepare the store with samples in it.")
        shards = tuple(
            Shard(storage.join(self.url, s["file"]), s["rows"], s["bytes"], s["sha256"]) for s in entry["shards"]
        )
        return Split(name, shards, cache or ShardCache())

    def _entry(self, split: str) -> dict[str, Any]:
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.url}: {unknown_name('split', split, self.splits)}")
        entry: dict[str, Any] = self.manifest["splits"][split]
        return entry


@dataclass(frozen=True)
class Shard:
    """Where one shard lies, and what it must be."""

    url: str
    rows: int
    bytes: int
    sha256: str


class Split:
    """The samples of one split by index. Cheap to send to another process: each one opens its own memory maps."""

    def __init__(self, name: str, shards: tuple[Shard, ...], cache: ShardCache) -> None:
        self.name = name
        self.shards = shards
        self.cache = cache
        self.shard_rows = tuple(shard.rows for shard in shards)
        self._ends = np.cumsum(self.shard_rows)
        self._open: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, index: int) -> Sample:
        """Sample `index` (0 .. len - 1): one look into a memory map, whatever the split's size.

        Raises StorageError where its shard cannot be fetched.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of split '{self.name}', which has {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard]) + self.shard_rows[shard]
        table = self._open.get(shard)
        if table is None:
            table = self._open_shard(shard)
        return Sample(*(table.column(name)[row].as_py() for name in SCHEMA.names))

    def _open_shard(self, shard: int) -> pa.Table:
        wanted = self.shards[shard]
        # A map keeps an evicted file's blocks on the disk: let go of those.
        self._open = {at: table for at, table in self._open.items() if self.cache.holds(self.shards[at].sha256)}
        table = self.cache.open(wanted.url, wanted.sha256, wanted.bytes)
        if table.num_rows != wanted.rows:
            raise StorageError(
                f"{wanted.url} holds {table.num_rows} samples, the manifest says {wanted.rows}: prepare it again."
            )
        self._open[shard] = table
        return table
