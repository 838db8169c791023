"""Preparing in parts: finished shards are kept, a changed plan is refused, and only a whole store is a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sceneray import storage
from sceneray.data import plan as plans
from sceneray.data.cache import ShardCache
from sceneray.data.images import decode_label
from sceneray.data.listing import LayoutOptions
from sceneray.data.plan import Plan, begin, commit, current, make_plan, write
from sceneray.data.store import Store
from sceneray.errors import DataError
from tests.support import shared
from tests.unit.data.test_folder import write_source


def town_plan(store: str, **options: object) -> Plan:
    """A plan of a tiny town."""
    small = {"train_scenes": 40, "val_scenes": 3, "size": (32, 40), **options}
    return make_plan("town", None, store, LayoutOptions(**small), 64)  # type: ignore[arg-type]


def test_a_store_exists_once_it_is_committed(tmp_path: Path) -> None:
    """With all shards but no manifest there is no store; with it there is, and the records are gone."""
    url = str(tmp_path / "store")
    plan = town_plan(url)
    for shard in begin(plan):
        write(shard)
    with pytest.raises(DataError, match="was never finished: run the same `sceneray prepare` again"):
        Store.open(url)
    store = commit(plan)
    assert {split: store.rows(split) for split in store.splits} == {"train": 40, "val": 3}
    assert store.split("train").read(5).name == "town-train-000005"
    assert not (tmp_path / "store" / plans.RECORDS).exists()
    found = current(plan)
    assert found is not None
    assert found.digest == store.digest


def test_finished_shards_are_kept(tmp_path: Path) -> None:
    """The same plan again leaves only what is not written yet."""
    plan = town_plan(str(tmp_path / "store"))
    first, *rest = begin(plan)
    write(first)
    assert begin(plan) == rest
    with pytest.raises(DataError, match="is not written: prepare again"):
        commit(plan)


def test_shards_split_all_samples_in_order(tmp_path: Path) -> None:
    """The shards of a split, one after the other, are its samples."""
    plan = town_plan(str(tmp_path / "store"))
    names = [item.name for shard in plan.shards if shard.split == "train" for item in shard.items]
    assert names == [f"town-train-{i:06}" for i in range(40)]
    assert [(s.split, s.index, s.total) for s in plan.shards] == [("train", 0, 2), ("train", 1, 2), ("val", 0, 1)]


def test_the_size_of_a_shard_is_bounded(tmp_path: Path) -> None:
    """--shard-mb cuts shards by the bytes of their photographs and labels."""
    source = write_source(tmp_path / "source", [f"train/{i}" for i in range(10)] + ["val/x"])
    one = sum(path.stat().st_size for path in (tmp_path / "source").glob("*/train/0.*"))
    plan = make_plan("folder", source, str(tmp_path / "store"), LayoutOptions(), 3.5 * one / 2**20)
    assert [len(shard.items) for shard in plan.shards] == [3, 3, 3, 1, 1]


def test_camvid_prepares(tmp_path: Path) -> None:
    """Six real street photographs become a store that holds their very bytes and their labels."""
    camvid, source = shared("data/camvid"), tmp_path / "camvid"
    for split, count in (("train", 4), ("val", 2)):
        for photo in sorted((camvid / "images" / split).iterdir())[:count]:
            for file in (photo, camvid / "labels" / split / f"{photo.stem}.png"):
                copy = source / file.relative_to(camvid)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    (source / "classes.json").write_bytes((camvid / "classes.json").read_bytes())
    plan = make_plan("folder", str(source), str(tmp_path / "store"), LayoutOptions(), 64)
    for shard in begin(plan):
        write(shard)
    store = commit(plan)
    assert {split: store.rows(split) for split in store.splits} == {"train": 4, "val": 2}
    assert store.classes[8].name == "car"
    sample = store.split("train", ShardCache(str(tmp_path / "cache"))).read(3)
    assert sample.image == (source / f"images/train/{sample.name}.jpg").read_bytes()
    truth = decode_label((source / f"labels/train/{sample.name}.png").read_bytes())
    assert np.array_equal(decode_label(sample.label), truth)
    assert (sample.height, sample.width) == truth.shape == (360, 480)
    counted = sum(
        np.bincount(decode_label(f.read_bytes()).ravel(), minlength=256) for f in source.glob("labels/train/*")
    )
    assert store.pixel_counts("train").tolist() == counted[:11].tolist()


def test_a_changed_plan_says_what_changed(tmp_path: Path) -> None:
    """Another seed, another size, another file: each is named, and nothing is touched."""
    url = str(tmp_path / "store")
    begin(town_plan(url))
    with pytest.raises(DataError, match=r"seed: 0 → 5; .*Give another STORE, or --overwrite"):
        begin(town_plan(url, seed=5))
    source = write_source(tmp_path / "source", ["train/a", "train/b", "val/c"])
    other = str(tmp_path / "other")
    begin(make_plan("folder", source, other, LayoutOptions(), 64))
    (tmp_path / "source/labels/train/a.png").write_bytes(b"longer than it was before, and no label")
    write_source(tmp_path / "source", ["train/new"])
    with pytest.raises(DataError, match="files: 1 added; files: 1 changed"):
        begin(make_plan("folder", source, other, LayoutOptions(), 64))


def test_overwrite_replaces_a_store(tmp_path: Path) -> None:
    """--overwrite begins anew; the old store is gone from the first moment."""
    url = str(tmp_path / "store")
    plan = town_plan(url)
    for shard in begin(plan):
        write(shard)
    commit(plan)
    changed = town_plan(url, seed=9)
    left = begin(changed, overwrite=True)
    assert left == list(changed.shards)
    assert not storage.exists(storage.join(url, storage.MANIFEST))
    for shard in left:
        write(shard)
    assert commit(changed).manifest["settings"]["seed"] == 9


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder that holds a manifest of something else is refused."""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds something else already"):
        begin(town_plan(str(tmp_path)))


def test_an_unknown_layout_names_the_known_ones(tmp_path: Path) -> None:
    """A misspelt layout gets the nearest."""
    with pytest.raises(DataError, match="did you mean 'folder'"):
        make_plan("foldr", None, str(tmp_path), LayoutOptions(), 64)


def test_town_takes_no_source(tmp_path: Path) -> None:
    """Drawn scenes have no source, at least one scene a split, and a size that can be drawn."""
    for source, options, message in [
        ("somewhere", {}, "takes no source"),
        (None, {"val_scenes": 0}, "the split 'val' needs at least one scene"),
        (None, {"size": (8, 8)}, "at least 32×32 pixels"),
    ]:
        with pytest.raises(DataError, match=message):
            make_plan("town", source, str(tmp_path), LayoutOptions(**options), 64)  # type: ignore[arg-type]
