"""The dataset store: plain Parquet for everybody, committed by its manifest, read by index."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sceneray import storage
from sceneray.data.cache import ShardCache
from sceneray.data.images import decode_image, decode_label, encode_jpeg, encode_label
from sceneray.data.store import ClassInfo, Sample, Store, shard_name, write_manifest, write_shard
from sceneray.errors import DataError, StorageError
from tests.support import ROOT

CLASSES = (ClassInfo(0, "wall", (1, 2, 3)), ClassInfo(1, "floor", (4, 5, 6)), ClassInfo(2, "lamp", (7, 8, 9)))


def sample(number: int) -> Sample:
    """A sample that can be told from any other; its label holds 4 × wall, 2 × floor, `number` × lamp, 1 × ignore."""
    label = np.array([[0, 0, 0, 0, 1, 1, 255, *[2] * number]], np.uint8)
    photo = encode_jpeg(np.full((1, label.shape[1], 3), number % 256, np.uint8))
    return Sample(f"scene/{number}", photo, encode_label(label), 1, label.shape[1])


def write_store(url: str, shard_rows: tuple[int, ...] = (3, 2), val: int = 2) -> Store:
    """A store with train shards of `shard_rows` samples numbered from 0, and `val` more samples."""
    starts = np.cumsum([0, *shard_rows])
    shards = [
        write_shard(url, "train", i, len(shard_rows), [sample(n) for n in range(starts[i], starts[i + 1])])
        for i in range(len(shard_rows))
    ]
    held = [write_shard(url, "val", 0, 1, [sample(100 + n) for n in range(val)])]
    return write_manifest(url, CLASSES, {"train": shards, "val": held}, {"layout": "test", "plan": {"sha256": "p"}})


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """An empty cache."""
    return ShardCache(str(tmp_path / "cache"), 1.0)


def test_shards_are_plain_parquet(tmp_path: Path) -> None:
    """pyarrow and pandas, knowing nothing of us, read names, types and bytes."""
    write_store(str(tmp_path))
    names = sorted(path.name for path in tmp_path.glob("*.parquet"))
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val-00000-of-00001.parquet"]
    table = pq.read_table(tmp_path / names[0])
    assert {field.name: str(field.type) for field in table.schema} == {
        "name": "string", "image": "large_binary", "label": "large_binary", "height": "int32", "width": "int32",
    }  # fmt: skip
    frame = pd.read_parquet(tmp_path / names[1])
    assert [Sample(*row) for row in frame.itertuples(index=False, name=None)] == [sample(3), sample(4)]


def test_parquet_does_not_compress_again(tmp_path: Path) -> None:
    """JPEG and PNG bytes do not shrink: columns are stored as they are, some dozens of rows a group."""
    info = write_shard(str(tmp_path), "train", 0, 1, [sample(n % 7) for n in range(70)])
    meta = pq.ParquetFile(tmp_path / info.file).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [32, 32, 6]
    compression = {meta.row_group(0).column(i).compression for i in range(meta.num_columns)}
    assert compression == {"UNCOMPRESSED"}


def test_the_manifest_describes_every_shard(tmp_path: Path) -> None:
    """Rows, bytes, sha256 and pixel counts in the manifest are those of the files."""
    store = write_store(str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["layout"]) == ("sceneray-store", 1, "test")
    assert (manifest["ignore_index"], manifest["row_group_rows"], manifest["plan"]) == (255, 32, {"sha256": "p"})
    for split in ("train", "val"):
        for shard in manifest["splits"][split]["shards"]:
            data = (tmp_path / shard["file"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert shard["rows"] == pq.read_metadata(tmp_path / shard["file"]).num_rows
    assert store.pixel_counts("train").tolist() == [4 * 5, 2 * 5, 0 + 1 + 2 + 3 + 4]
    assert manifest["splits"]["train"]["ignored_pixels"] == 5
    assert store.classes == CLASSES
    assert (store.splits, store.rows("train"), store.shard_rows("train")) == (("train", "val"), 5, [3, 2])


def test_equal_samples_make_equal_stores(tmp_path: Path) -> None:
    """A store's digest names its content: written twice it is the same, another sample makes another."""
    first, second = (write_store(str(tmp_path / name)) for name in ("a", "b"))
    other = write_store(str(tmp_path / "c"), shard_rows=(3, 3))
    assert first.digest == second.digest == Store.open(str(tmp_path / "a")).digest
    assert other.digest != first.digest


def test_any_sample_is_read_by_index(tmp_path: Path, cache: ShardCache) -> None:
    """Index i is sample i, in whatever shard and row group it lies and in whatever order it is asked for."""
    split = write_store(str(tmp_path / "store"), (70, 1, 40)).split("train", cache)
    assert (len(split), split.shard_rows) == (111, (70, 1, 40))
    for index in np.random.default_rng(0).permutation(111).tolist():
        assert split.read(index) == sample(index)
    for outside in (-1, 111):
        with pytest.raises(IndexError, match=r"which has 111"):
            split.read(outside)


def test_a_split_travels_without_its_maps(tmp_path: Path, cache: ShardCache) -> None:
    """A split that was read from is as cheap to send to another process as a fresh one, and reads there."""
    store = write_store(str(tmp_path / "store"))
    used, fresh = store.split("train", cache), store.split("train", cache)
    used.read(0)
    data = pickle.dumps(used)
    assert len(data) == len(pickle.dumps(fresh))
    assert pickle.loads(data).read(4) == sample(4)


def test_reading_maps_and_does_not_load(tmp_path: Path, cache: ShardCache) -> None:
    """Opening a shard takes no memory for its photos: they stay in the file until they are asked for."""
    split = write_store(str(tmp_path / "store"), (40,)).split("train", cache)
    before = pa.total_allocated_bytes()
    split.read(0)
    split.read(39)
    assert pa.total_allocated_bytes() - before < 4096


def test_a_store_works_at_any_url(any_root: str, cache: ShardCache) -> None:
    """Written and read on a local disk, in memory and on S3."""
    write_store(f"{any_root}/store")
    assert Store.open(f"{any_root}/store").split("val", cache).read(1) == sample(101)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """Nothing there, shards without a manifest, a plan without a manifest, another format, another version."""
    url = str(tmp_path)
    with pytest.raises(DataError, match=r"holds no dataset store: .*sceneray prepare LAYOUT"):
        Store.open(url)
    write_shard(url, "train", 0, 1, [sample(1)])
    with pytest.raises(DataError, match="holds no dataset store"):
        Store.open(url)
    storage.write_json(f"{url}/plan.json", {})
    with pytest.raises(DataError, match="was never finished: run the same `sceneray prepare` again"):
        Store.open(url)
    write_store(url)
    manifest = storage.read_json(f"{url}/manifest.json")
    for change, message in (
        ({"version": 2}, "is a dataset store of version 2; this sceneray reads version 1"),
        ({"format": "sceneray-checkpoint"}, "is no dataset store"),
        ({"classes": None}, "the manifest .* is damaged"),
    ):
        storage.write_json(f"{url}/manifest.json", {**manifest, **change})
        with pytest.raises(DataError, match=message):
            Store.open(url)


def test_unknown_and_empty_splits_are_named(tmp_path: Path) -> None:
    """A split that is not there is answered with the known ones; an empty one says it is empty."""
    store = write_store(str(tmp_path), val=0)
    with pytest.raises(DataError, match="unknown split 'trian': did you mean 'train'"):
        store.split("trian")
    with pytest.raises(DataError, match=r"the split 'val' .* is empty"):
        store.split("val")


def test_a_lost_or_damaged_shard_is_found_when_it_is_read(tmp_path: Path, cache: ShardCache) -> None:
    """A shard that is gone, or differs from the manifest by one bit, is never read as data."""
    store = write_store(str(tmp_path / "store"))
    first, second = (tmp_path / "store" / shard_name("train", i, 2) for i in (0, 1))
    damaged = bytearray(first.read_bytes())
    damaged[60] ^= 1
    first.write_bytes(damaged)
    second.unlink()
    split = store.split("train", cache)
    with pytest.raises(StorageError, match=r"train-00000-of-00002.parquet is damaged"):
        split.read(0)
    with pytest.raises(StorageError, match="is in the store's manifest but is missing"):
        split.read(4)


def test_a_store_of_version_1_is_read_for_ever(tmp_path: Path, cache: ShardCache) -> None:
    """The first format's store, kept as it was written, gives its three scenes."""
    with zipfile.ZipFile(ROOT / "tests" / "formats" / "store-v1.zip") as kept:
        kept.extractall(tmp_path)
    store = Store.open(str(tmp_path))
    assert {split: store.rows(split) for split in store.splits} == {"train": 2, "val": 1}
    assert [info.name for info in store.classes][:3] == ["sky", "building", "road"]
    scene = store.split("val", cache).read(0)
    assert (scene.name, scene.height, scene.width) == ("val-0", 40, 72)
    assert decode_image(scene.image).shape == (40, 72, 3)
    counted = np.bincount(decode_label(scene.label).ravel(), minlength=len(store.classes))
    assert counted.tolist() == store.pixel_counts("val").tolist()
