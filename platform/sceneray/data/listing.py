"""What a layout finds in its source: classes, and for each split the samples to read.

A layout is one function `(source, options) -> Listing`, named in `sceneray.data.layouts.LAYOUTS`. It lists and never
decodes; `Listing.read` turns one item into a sample, on whatever worker writes its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from sceneray import storage
from sceneray.data.images import decode_label, encode_label, stored_photo
from sceneray.data.store import IGNORE_INDEX, ClassInfo, Sample
from sceneray.errors import DataError


@dataclass(frozen=True)
class LayoutOptions:
    """What a user may tell a layout; each layout uses its part."""

    val: float | None = None  # share of samples that become "val" where the source has no splits
    seed: int = 0
    group: str | None = None  # regular expression; samples whose first groups agree stay in one split
    train_scenes: int = 480
    val_scenes: int = 96
    size: tuple[int, int] = (96, 128)  # height, width of a drawn scene


@dataclass(frozen=True)
class Item:
    """One sample to read: where its files are, and how large (which tells a changed source from an unchanged one)."""

    name: str
    image: str
    label: str = ""
    bytes: int = 0


T = TypeVar("T")
Reader = Callable[[Item, Sequence[ClassInfo], int], Sample]


def read_pair(item: Item, classes: Sequence[ClassInfo], ignore_index: int) -> Sample:
    """A photo and its index label, checked. Values `ignore_index` of the source become 255.

    Raises DataError naming the file, the rule and the fix.
    """
    image, height, width = _about(item.image, lambda: stored_photo(storage.read_bytes(item.image)))
    label = _about(item.label, lambda: decode_label(storage.read_bytes(item.label)))
    check_label(label, (height, width), classes, ignore_index, item)
    if ignore_index != IGNORE_INDEX:
        label = np.where(label == ignore_index, np.uint8(IGNORE_INDEX), label)
    return Sample(item.name, image, encode_label(label), height, width)


@dataclass(frozen=True)
class Listing:
    """All that a store is made from."""

    classes: tuple[ClassInfo, ...]
    splits: Mapping[str, Sequence[Item]]
    settings: Mapping[str, Any] = field(default_factory=dict)  # options that shaped it, for the plan
    ignore_index: int = IGNORE_INDEX  # in the source's labels; a store always has 255
    read: Reader = read_pair


def check_label(
    label: np.ndarray, size: tuple[int, int], classes: Sequence[ClassInfo], ignore_index: int, item: Item
) -> None:
    """Raise DataError where a label (uint8 [H, W]) is of another size than its photo or holds an unknown id."""
    if label.shape != size:
        raise DataError(
            f"{item.label}: the label is {label.shape[0]}×{label.shape[1]} and its photo {size[0]}×{size[1]} (height × "
            f"width), but they must be of one size. Resize the label without blending ids, or replace it."
        )
    allowed = np.zeros(256, bool)
    allowed[[info.id for info in classes]] = True
    allowed[ignore_index] = True
    unknown = np.unique(label[~allowed[label]])
    if unknown.size:
        raise DataError(
            f"{item.label}: the label holds the value{'s' * (unknown.size > 1)} {_few(unknown.tolist())}, but the "
            f"classes are 0 to {len(classes) - 1} and {ignore_index} means ignore. Mend the label, or add the class."
        )


def _few(values: Sequence[int]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown}, ... ({len(values)} of them)"


def _about(file: str, read: Callable[[], T]) -> T:
    """The result of `read`; its DataError gets the file's name in front."""
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"{file}: the file is gone since it was listed. Put it back, or prepare again.") from error
    except DataError as error:
        raise DataError(f"{file}: {error}.") from error
