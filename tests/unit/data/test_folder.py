"""The folder layout: what it lists, how it splits, and how it refuses what breaks its rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sceneray.data.images import decode_label
from sceneray.data.layouts import LAYOUTS
from sceneray.data.layouts.folder import place_of
from sceneray.data.listing import LayoutOptions, Listing, read_pair
from sceneray.errors import DataError
from tests.support import shared

CLASSES = [{"id": 0, "name": "wall", "color": [1, 2, 3]}, {"id": 1, "name": "floor", "color": [4, 5, 6]}]
LABEL = np.tile(np.array([[0, 1], [255, 1]], np.uint8), (6, 8))


def write_source(folder: Path, names: list[str], **document: object) -> str:
    """A source whose photographs and labels have the given names (`split/name` or `name`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "ignore_index": 255, **document}))
    for name in names:
        photo, label = folder / "images" / f"{name}.jpg", folder / "labels" / f"{name}.png"
        for path in (photo, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(photo)
        Image.fromarray(LABEL).save(label)
    return str(folder)


def listed(source: str | None, **options: object) -> Listing:
    """What the layout finds."""
    return LAYOUTS["folder"](source, LayoutOptions(**options))  # type: ignore[arg-type]


def first_sample(listing: Listing) -> np.ndarray:
    """The label of the first train sample, read and checked."""
    item = listing.splits["train"][0]
    return decode_label(read_pair(item, listing.classes, listing.ignore_index).label)


def test_split_folders_are_kept(tmp_path: Path) -> None:
    """Folders below images/ are the splits, and names lose that prefix."""
    found = listed(write_source(tmp_path, ["train/b", "train/a", "val/c", "extra/deep/d"]))
    assert {split: [item.name for item in items] for split, items in found.splits.items()} == {
        "extra": ["deep/d"], "train": ["a", "b"], "val": ["c"],
    }  # fmt: skip
    assert [info.name for info in found.classes] == ["wall", "floor"]
    assert np.array_equal(first_sample(found), LABEL)


def test_another_ignore_index_becomes_255(tmp_path: Path) -> None:
    """A store always has 255 for "no class", whatever the source used."""
    source = write_source(tmp_path, ["train/a", "val/b"], ignore_index=7)
    Image.fromarray(np.where(LABEL == 255, 7, LABEL).astype(np.uint8)).save(tmp_path / "labels/train/a.png")
    assert np.array_equal(first_sample(listed(source)), LABEL)


def test_palette_labels_are_read_as_ids(tmp_path: Path) -> None:
    """A palette PNG counts by its indices, never by its colours."""
    source = write_source(tmp_path, ["train/a", "val/b"])
    picture = Image.fromarray(LABEL)
    picture.putpalette(bytes(range(255, -1, -1)) * 3)
    picture.save(tmp_path / "labels/train/a.png")
    assert np.array_equal(first_sample(listed(source)), LABEL)


@given(st.lists(st.text("ab/01_", min_size=1, max_size=8), min_size=2, max_size=12, unique=True), st.integers())
def test_adding_photographs_moves_none(names: list[str], seed: int) -> None:
    """Where a name belongs depends on the name and the seed alone, evenly over [0, 1)."""
    places = {name: place_of(name, seed) for name in names}
    assert all(0 <= place < 1 for place in places.values())
    assert {name: place_of(name, seed) for name in reversed(names)} == places


def test_splits_are_drawn_about_as_asked(tmp_path: Path) -> None:
    """--val 0.25 puts about a quarter into val, each photograph into exactly one split."""
    found = listed(write_source(tmp_path, [f"p{i:03}" for i in range(80)]), val=0.25, seed=1)
    counts = {split: len(items) for split, items in found.splits.items()}
    assert counts["train"] + counts["val"] == 80
    assert 10 <= counts["val"] <= 30
    assert not {i.name for i in found.splits["train"]} & {i.name for i in found.splits["val"]}


def test_a_group_stays_together(tmp_path: Path) -> None:
    """--group keeps all photographs of a drive in one split."""
    names = [f"drive{d:02}_{i}" for d in range(20) for i in range(3)]
    found = listed(write_source(tmp_path, names), val=0.3, group=r"(drive\d+)_")
    drives = {split: {item.name[:7] for item in items} for split, items in found.splits.items()}
    assert drives["train"] | drives["val"] == {name[:7] for name in names}
    assert not drives["train"] & drives["val"]


def damage(folder: Path, kind: str) -> None:
    """Break one rule of the layout."""
    label, photo = folder / "labels/train/a.png", folder / "images/train/a.jpg"
    if kind == "rgb":
        Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(label)
    elif kind == "value":
        Image.fromarray(np.full((12, 16), 9, np.uint8)).save(label)
    elif kind == "size":
        Image.fromarray(LABEL[:8]).save(label)
    elif kind == "truncated photo":
        photo.write_bytes(photo.read_bytes()[:-200])
    elif kind == "truncated label":
        label.write_bytes(label.read_bytes()[:40])
    elif kind == "text":
        photo.write_text("not a photograph")
    elif kind == "gone":
        label.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rgb", r"labels/train/a.png: .*picture in colours.*turn its colours into ids"),
        ("value", r"labels/train/a.png: the label holds the value 9, but the classes are 0 to 1 and 255 means ignore"),
        ("size", r"labels/train/a.png: the label is 8×16 and its photo 12×16"),
        ("truncated photo", r"images/train/a.jpg: the photo cannot be read.*truncated"),
        ("truncated label", r"labels/train/a.png: the label cannot be read.*truncated"),
        ("text", r"images/train/a.jpg: the photo cannot be read"),
        ("gone", r"labels/train/a.png: the file is gone"),
    ],
)
def test_a_bad_file_is_named_with_rule_and_fix(tmp_path: Path, kind: str, message: str) -> None:
    """Reading a sample that breaks a rule names the file."""
    found = listed(write_source(tmp_path, ["train/a", "val/b"]))
    damage(tmp_path, kind)
    with pytest.raises(DataError, match=message):
        first_sample(found)


def test_a_photograph_without_label_is_listed(tmp_path: Path) -> None:
    """Unpaired names are counted and the first ones shown."""
    source = write_source(tmp_path, ["train/a", "train/b", "val/c"])
    (tmp_path / "labels/train/b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 names have no label in labels/, the first: train/b"):
        listed(source)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"classes": [{"id": 1, "name": "a", "color": [0, 0, 0]}]}, "class ids must be 0, 1, 2"),
        ({"classes": []}, "class ids must be 0, 1, 2"),
        ({"classes": [{**CLASSES[0]}, {**CLASSES[1], "name": "wall"}]}, "class names must differ; wall"),
        ({"classes": [{"id": 0, "name": "a", "color": [0, 300, 0]}]}, "not a list of classes"),
        ({"classes": [{"id": 0}]}, "not a list of classes"),
        ({"ignore_index": 1}, "ignore_index must be from 2 to 255"),
    ],
)
def test_bad_classes_are_refused(tmp_path: Path, document: dict[str, object], message: str) -> None:
    """classes.json must list ids 0, 1, 2, ... with names and colours."""
    with pytest.raises(DataError, match=message):
        listed(write_source(tmp_path, ["train/a"], **document))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """No source, no classes.json, no photographs, photographs beside splits, an empty split: each with its fix."""
    with pytest.raises(DataError, match="needs its source"):
        listed(None)
    with pytest.raises(DataError, match=r"classes.json: missing. It lists the classes"):
        listed(str(tmp_path / "nothing"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/classes.json").write_text(json.dumps({"classes": CLASSES}))
    with pytest.raises(DataError, match="images: no files"):
        listed(str(tmp_path / "bare"))
    with pytest.raises(DataError, match="1 photographs beside its split folders: b"):
        listed(write_source(tmp_path / "mixed", ["train/a", "b"]))
    with pytest.raises(DataError, match="the split 'val' would be empty"):
        listed(write_source(tmp_path / "few", ["a", "b"]), val=0.001)


def test_camvid_is_a_folder() -> None:
    """The real street photographs: 367 train, 101 val, 11 classes, and a label that reads."""
    found = listed(str(shared("data/camvid")))
    assert {split: len(items) for split, items in found.splits.items()} == {"train": 367, "val": 101}
    assert [info.name for info in found.classes][:4] == ["sky", "building", "pole", "road"]
    assert first_sample(found).shape == (360, 480)
