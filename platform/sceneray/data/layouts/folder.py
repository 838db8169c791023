"""`folder`: the plain layout for one's own photographs.

SOURCE/classes.json             {"classes": [{"id": 0, "name": "sky", "color": [70, 130, 180]}, ...]}
SOURCE/images/SPLIT/NAME.jpg    photographs; or images/NAME.jpg, and --val makes the splits
SOURCE/labels/SPLIT/NAME.png    8-bit PNG of class ids (grey or palette), of the photograph's size; 255 = ignore
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from sceneray import storage
from sceneray.data.listing import Item, LayoutOptions, Listing
from sceneray.data.store import IGNORE_INDEX, ClassInfo
from sceneray.errors import DataError

CLASSES = "classes.json"
PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABELS = (".png", ".bmp", ".tif", ".tiff", ".gif")
DEFAULT_VAL = 0.1

Files = dict[str, tuple[str, int]]  # name without suffix → (URL, size in bytes)


def folder(source: str | None, options: LayoutOptions) -> Listing:
    """List a folder; photographs and labels are paired by name. Raises DataError where a rule is broken."""
    if source is None:
        raise DataError("the layout 'folder' needs its source: sceneray prepare folder SOURCE STORE")
    source = storage.absolute(source)
    classes, ignore_index = read_classes(storage.join(source, CLASSES))
    photos, labels = _files(source, "images", PHOTOS), _files(source, "labels", LABELS)
    _check_pairs(source, photos, labels)
    by_split: dict[str, list[str]] = {}
    for name in sorted(photos):
        split = name.split("/")[0] if "/" in name else ""
        by_split.setdefault(split, []).append(name)
    settings: dict[str, Any] = {}
    if "" in by_split:
        if len(by_split) > 1:
            raise DataError(
                f"{source}/images holds {len(by_split[''])} photographs beside its split folders: "
                f"{', '.join(by_split[''][:3])}. Move them into split folders, or all photographs out of them."
            )
        by_split, settings = _drawn_splits(by_split[""], options)
    splits = {split: [_item(name, split, photos, labels) for name in names] for split, names in by_split.items()}
    return Listing(classes, splits, settings, ignore_index)


def read_classes(url: str) -> tuple[tuple[ClassInfo, ...], int]:
    """Classes and ignore index of a classes.json. Raises DataError where it is missing or breaks a rule."""
    try:
        document = json.loads(storage.read_bytes(url))
        classes = tuple(ClassInfo(int(c["id"]), str(c["name"]), _color(c["color"])) for c in document["classes"])
        ignore_index = int(document.get("ignore_index", IGNORE_INDEX))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{url}: missing. It lists the classes: {_EXAMPLE}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url}: not a list of classes ({error!r}). It must look like {_EXAMPLE}") from error
    if [info.id for info in classes] != list(range(len(classes))) or not 1 <= len(classes) <= IGNORE_INDEX:
        ids = ", ".join(str(info.id) for info in classes[:12])
        raise DataError(
            f"{url}: class ids must be 0, 1, 2, ... in this order, at most {IGNORE_INDEX}; got {ids or 'none'}."
        )
    names = [info.name for info in classes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{url}: class names must differ; {', '.join(twice)} comes more than once.")
    if not 0 <= ignore_index <= 255 or ignore_index < len(classes):
        raise DataError(f"{url}: ignore_index must be from {len(classes)} to 255, no class's id; got {ignore_index}.")
    return classes, ignore_index


def place_of(name: str, seed: int, pattern: str | None = None) -> float:
    """Where a name stands in [0, 1): below --val it belongs to "val". Depends on (its group, seed) alone."""
    group = name
    if pattern is not None:
        match = re.search(pattern, name)
        if match is None:
            raise DataError(f"--group '{pattern}' does not match '{name}': every photograph needs a group.")
        group = match[match.re.groups and 1]
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _drawn_splits(names: Sequence[str], options: LayoutOptions) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Splits by name or group: adding photographs moves none of the others between splits."""
    val = DEFAULT_VAL if options.val is None else options.val
    if not 0 < val < 1:
        raise DataError(f"--val is a share between 0 and 1, got {val}.")
    if options.group is not None:
        try:
            re.compile(options.group)
        except re.error as error:
            raise DataError(f"--group '{options.group}' is no regular expression: {error}.") from error
    places = {name: place_of(name, options.seed, options.group) for name in names}
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name, place in places.items():
        splits["val" if place < val else "train"].append(name)
    empty = [split for split, members in splits.items() if not members]
    if empty:
        raise DataError(
            f"the split '{empty[0]}' would be empty: {len(names)} photographs with --val {val} --seed {options.seed}. "
            "Give another --val or --seed, smaller groups, or folders images/train and images/val."
        )
    return splits, {"val": val, "seed": options.seed, "group": options.group}


def _files(source: str, kind: str, suffixes: tuple[str, ...]) -> Files:
    url = storage.join(source, kind)
    found: Files = {}
    for path, size in storage.walk_files(url):
        name = PurePosixPath(path)
        if name.suffix.lower() not in suffixes or name.name.startswith("."):
            continue
        stem = str(name.with_suffix(""))
        if stem in found:
            raise DataError(f"{url}: two files are named '{stem}': {found[stem][0]} and {path}. Keep one.")
        found[stem] = (storage.join(url, path), size)
    if not found:
        raise DataError(
            f"{url}: no files ({', '.join(suffixes)}) there. The layout is images/SPLIT/NAME.jpg and "
            "labels/SPLIT/NAME.png."
        )
    return found


def _check_pairs(source: str, photos: Files, labels: Files) -> None:
    checks = (
        ("label", photos.keys() - labels.keys(), "labels"),
        ("photograph", labels.keys() - photos.keys(), "images"),
    )
    for kind, missing, other in checks:
        if missing:
            few = ", ".join(sorted(missing)[:3])
            raise DataError(
                f"{source}: {len(missing)} of {len(photos | labels)} names have no {kind} in {other}/, the first: "
                f"{few}. A photograph and its label share their path but for the suffix: add what is missing, or "
                "remove the rest."
            )


def _item(name: str, split: str, photos: Files, labels: Files) -> Item:
    (image, image_bytes), (label, label_bytes) = photos[name], labels[name]
    return Item(name.removeprefix(f"{split}/"), image, label, image_bytes + label_bytes)


def _color(value: Sequence[int]) -> tuple[int, int, int]:
    red, green, blue = (int(part) for part in value)
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise ValueError(f"a colour is three numbers from 0 to 255, got {list(value)}")
    return red, green, blue


_EXAMPLE = '{"classes": [{"id": 0, "name": "sky", "color": [70, 130, 180]}, ...], "ignore_index": 255}'
