"""Drawn street scenes with exact labels: the dataset that needs no download.

`draw(seed, height, width)` is a pure function: a camera in a street of houses, trees, cars, people and poles, in
some light. Classes overlap in colour (grey sky, road, walls and cars; green leaves, walls and coats), and the camera
tilts, turns and moves, so neither a pixel's colour nor its place tells its class: shape and context are needed.
`benchmarks/town_difficulty.py` measures that.

Seeds: scene `index` of a split is drawn from `scene_seed(seed, split, index)`. The splits take disjoint ranges, and
"held_out" is a third range that no store contains.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sceneray.data.store import ClassInfo
from sceneray.data.townscape.canvas import Canvas
from sceneray.data.townscape.look import make_light
from sceneray.data.townscape.photo import SUPERSAMPLING, develop, majority
from sceneray.data.townscape.street import draw_houses, draw_things, empty_street, make_camera, make_street
from sceneray.errors import DataError, unknown_name

# Raised when the same seed draws another picture: a store knows which town it holds.
VERSION: Final = 1
CLASSES: tuple[ClassInfo, ...] = (
    ClassInfo(0, "sky", (70, 130, 180)),
    ClassInfo(1, "building", (140, 80, 70)),
    ClassInfo(2, "road", (128, 64, 128)),
    ClassInfo(3, "pavement", (244, 150, 200)),
    ClassInfo(4, "tree", (80, 150, 50)),
    ClassInfo(5, "car", (30, 60, 190)),
    ClassInfo(6, "person", (220, 20, 60)),
    ClassInfo(7, "pole", (240, 210, 60)),
)
SPLIT_SEEDS = {"train": 0, "val": 1, "held_out": 2}
SEEDS_A_SPLIT = 10**8


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of scene `index` (0 .. 1e8 - 1) of a split ("train", "val" or "held_out") of the town `seed`."""
    if split not in SPLIT_SEEDS:
        raise DataError(unknown_name("town split", split, SPLIT_SEEDS))
    if not 0 <= index < SEEDS_A_SPLIT:
        raise DataError(f"a town split holds scenes 0 to {SEEDS_A_SPLIT - 1}, got {index}.")
    return (seed * len(SPLIT_SEEDS) + SPLIT_SEEDS[split]) * SEEDS_A_SPLIT + index


def draw(seed: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One scene: photo uint8 [height, width, 3] in RGB and its label uint8 [height, width] of class ids 0..7.

    The scene itself depends on the seed alone; the size sets how finely it is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    light, street = make_light(rng), make_street(rng)
    camera = make_camera(rng, street, height * SUPERSAMPLING, width * SUPERSAMPLING)
    canvas = Canvas(camera, light.horizon, light.haze_per_m)
    ground_x, ground_z, rise = camera.ground()
    canvas.start(empty_street(canvas, rng, light, street, ground_x, ground_z, rise))
    draw_houses(canvas, rng, light, street)
    draw_things(canvas, rng, light, street)
    index, shade = canvas.images()
    label = majority(np.array(canvas.classes, dtype=np.uint8)[index])
    return develop(canvas, rng, light, index, shade, rise), label
