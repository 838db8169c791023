"""Small real stores and settings for tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np

from sceneray import config
from sceneray.config import TrainSettings
from sceneray.data import town
from sceneray.data.images import encode_jpeg, encode_label
from sceneray.data.store import Sample, Store, write_manifest, write_shard

HEIGHT, WIDTH = 48, 64


def town_sample(split: str, index: int, height: int = HEIGHT, width: int = WIDTH) -> Sample:
    """One drawn scene, encoded."""
    image, label = town.draw(town.scene_seed(0, split, index), height, width)
    return Sample(f"{split}-{index}", encode_jpeg(image, 95), encode_label(label), height, width)


def town_store(url: str, train: int = 12, val: int = 5, shards: int = 2) -> Store:
    """A store of drawn scenes; the last val scene has another size than the others."""
    split_rows = {"train": np.array_split(np.arange(train), shards), "val": np.array_split(np.arange(val), 1)}
    written: dict[str, list[Any]] = {}
    for split, parts in split_rows.items():
        for number, rows in enumerate(parts):
            last = split == "val" and number == len(parts) - 1
            samples = [town_sample(split, int(i)) for i in rows]
            if last:
                samples[-1] = town_sample(split, val - 1, 40, 72)
            written.setdefault(split, []).append(write_shard(url, split, number, len(parts), samples))
    return write_manifest(url, town.CLASSES, written, {"layout": "town"})


def tiny_settings(store: str, run: str, *overrides: str) -> TrainSettings:
    """Settings of a run that takes seconds: a small PSPNet, small crops, one thread."""
    tiny = (
        f"run={run}",
        f"data.store={store}",
        "augment.crop=[32, 40]",
        "model={backbone: resnet18, output_stride: 16, head_width: 8, aux_width: 8, pool_width: 4}",
        "epochs=2",
        "batch_size=4",
        "precision=fp32",
        "threads=1",
        "workers=1",
        "log={every_steps: 1, contact_sheet: 2, tensorboard: false}",
    )
    return config.load(TrainSettings, None, [*tiny, *overrides])
