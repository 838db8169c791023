"""`town`: drawn street scenes from a seed; there is no source."""

from __future__ import annotations

from collections.abc import Sequence

from sceneray.data.images import encode_jpeg, encode_label
from sceneray.data.listing import Item, LayoutOptions, Listing
from sceneray.data.store import ClassInfo, Sample
from sceneray.data.town import CLASSES, VERSION, draw, scene_seed
from sceneray.errors import DataError

JPEG_QUALITY = 95


def town(source: str | None, options: LayoutOptions) -> Listing:
    """Scenes of the town `options.seed`: `train_scenes` and `val_scenes` of `size`, from disjoint ranges of seeds."""
    if source is not None:
        raise DataError(
            f"the layout 'town' draws its scenes and takes no source, got {source}: sceneray prepare town STORE"
        )
    height, width = options.size
    if min(height, width) < 32:
        raise DataError(f"a town scene needs at least 32×32 pixels, got {height}×{width}: give a larger --size.")
    counts = {"train": options.train_scenes, "val": options.val_scenes}
    for split, count in counts.items():
        if count < 1:
            raise DataError(f"the split '{split}' needs at least one scene, got {count}.")
    splits = {
        split: [
            Item(f"town-{split}-{index:06d}", _describe(options, split, index), bytes=height * width)
            for index in range(count)
        ]
        for split, count in counts.items()
    }
    settings = {"seed": options.seed, "size": [height, width], "scenes": counts, "drawing": VERSION}
    return Listing(CLASSES, splits, settings, read=read_scene)


def read_scene(item: Item, _classes: Sequence[ClassInfo], _ignore_index: int) -> Sample:
    """Draw the scene that an item of `town` describes."""
    seed, height, width = (int(part) for part in item.image.split(":")[1:])
    image, label = draw(seed, height, width)
    return Sample(item.name, encode_jpeg(image, JPEG_QUALITY), encode_label(label), height, width)


def _describe(options: LayoutOptions, split: str, index: int) -> str:
    height, width = options.size
    return f"town:{scene_seed(options.seed, split, index)}:{height}:{width}"
