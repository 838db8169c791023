"""Batches of drawn photos: what goes in, and what is looked at when it came out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.batch_plan import Row
from sceneray import storage
from sceneray.data.images import decode_label
from sceneray.predictor import Predictor
from tests.bundles import half_bright

SHAPES = ((48, 64), (40, 80), (64, 48))


def draw(folder: Path, count: int) -> None:
    """`count` PNGs of three shapes in five folders below `folder`, no two alike."""
    rng = np.random.default_rng(count)
    for i in range(count):
        image = half_bright(*SHAPES[i % len(SHAPES)])[0]
        image += rng.integers(0, 12, image.shape, dtype=np.uint8)
        path = folder / f"day-{i % 5}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def lines(out: str) -> list[Row]:
    """What the finished parts tell of their photos, in the order of the parts."""
    folder = storage.join(out, "predictions")
    names = [name for name in storage.list_names(folder) if name.endswith(".jsonl")]
    return [json.loads(line) for name in names for line in storage.read_bytes(storage.join(folder, name)).splitlines()]


def check_masks(out: str, rows: list[Row], bundle: str) -> None:
    """Each row's mask is what the predictor answers for the photo alone, and the bytes are those the row tells."""
    predictor = Predictor.load(bundle, "cpu")
    for row in rows:
        image = np.asarray(Image.open(row["image"]))
        data = storage.read_bytes(storage.join(out, row["mask"]))
        assert np.array_equal(decode_label(data), predictor.predict([image])[0]), row["image"]
        assert (len(data), storage._digest(data)) == (row["bytes"], row["sha256"])


def changed_at(folder: Path) -> dict[str, int]:
    """When each file below `folder` was written, in ns."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
