"""Drawn street scenes with exact labels: the dataset that needs no download.

`draw(seed, height, width)` is a pure function: a camera in a street of houses, trees, cars, people and poles, in
some light. Classes overlap in colour (grey sky, road, walls and cars; green leaves, walls and coats), and the camera
tilts, turns and moves, so neither a pixel's colour nor its place tells its class: shape and context are needed.
`benchmarks/town_difficulty.py` measures that.

Seeds: scene `index` of a split is drawn from `scene_seed(seed, split, index)`. The splits take disjoint ranges, and
"held_out" is a third range that no store contains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sceneray.data.store import ClassInfo
from sceneray.data.town_canvas import FAR_M, Camera, Canvas, Color, Float, mix, scale
from sceneray.data.town_cars import car
from sceneray.data.town_objects import PAVEMENT, ROAD, SKY, TREE, Light, building, person, pick, pole, tree
from sceneray.errors import DataError, unknown_name

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
SUPERSAMPLING = 2


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
    light, street = _light(rng), _street(rng)
    camera = _camera(rng, street, height * SUPERSAMPLING, width * SUPERSAMPLING)
    canvas = Canvas(camera, light.horizon, light.haze_per_m)
    ground_x, ground_z, rise = camera.ground()
    canvas.start(_ground(canvas, rng, light, street, ground_x, ground_z, rise))
    _houses(canvas, rng, light, street)
    _things(canvas, rng, light, street)
    index, shade = canvas.images()
    label = _majority(np.array(canvas.classes, dtype=np.uint8)[index])
    return _develop(canvas, rng, light, index, shade, rise), label


@dataclass(frozen=True)
class _Street:
    """The street's plan in metres: half widths of road and street, and the side street's stretch along z."""

    road: float
    walls: float
    crossing: tuple[float, float]
    end: float


def _street(rng: np.random.Generator) -> _Street:
    road = rng.uniform(2.6, 5.2)
    start = rng.uniform(9, 40) if rng.random() < 0.5 else FAR_M
    return _Street(road, road + rng.uniform(2.2, 5.5), (start, start + rng.uniform(6, 9)), rng.uniform(45, 110))


def _camera(rng: np.random.Generator, street: _Street, rows: int, columns: int) -> Camera:
    """On the road or on a pavement, at a car's or a standing person's height, never quite level."""
    reach = street.walls - 1.2
    x = rng.uniform(-reach, reach)
    yaw = rng.uniform(-0.28, 0.28) - 0.035 * x
    focal = columns * rng.uniform(0.78, 1.15)
    pitch = rng.uniform(-0.14, 0.16)
    return Camera(rows, columns, focal, x, rng.uniform(1.35, 3.0), yaw, pitch, rng.normal(0, 0.03))


def _light(rng: np.random.Generator) -> Light:
    kind = rng.choice(["day", "overcast", "dusk"], p=[0.45, 0.33, 0.22])
    sun_side = float(rng.choice([-1.0, 1.0]))
    gain = rng.uniform(0.85, 1.12)
    if kind == "day":
        lit, dim = 1.12, rng.uniform(0.62, 0.8)
        left, right = (lit, dim) if sun_side > 0 else (dim, lit)
        cast = (-sun_side * rng.uniform(0.4, 1.4), rng.uniform(-0.5, 0.7))
        zenith = mix((64, 112, 172), (120, 150, 180), rng.random())
        horizon = mix((168, 196, 216), (216, 214, 204), rng.random())
        return Light(
            scale((1.04, 1.0, 0.94), gain), left, right, rng.uniform(0.75, 1.05), rng.uniform(0.5, 0.68), cast,
            zenith, horizon, (240, 240, 238), rng.uniform(0.0, 0.75), rng.uniform(0.001, 0.006), False,
        )  # fmt: skip
    if kind == "overcast":
        grey = rng.uniform(120, 214)
        zenith, horizon = (grey * 0.92, grey * 0.95, grey), (grey, grey, grey * 0.99)
        return Light(
            scale((0.94, 0.97, 1.0), gain), 0.94, 0.9, 0.9, 1.0, (sun_side * 0.1, 0.0), zenith, horizon,
            (grey * 1.08,) * 3, rng.uniform(0.3, 1.0), rng.uniform(0.002, 0.014), False,
        )  # fmt: skip
    zenith = mix((58, 62, 110), (112, 92, 132), rng.random())
    horizon = mix((232, 158, 104), (200, 140, 140), rng.random())
    return Light(
        scale((0.72, 0.62, 0.66), gain), 0.9, 0.86, rng.uniform(0.7, 0.95), 1.0, (sun_side * 0.1, 0.0), zenith, horizon,
        (214, 140, 120), rng.uniform(0.2, 0.8), rng.uniform(0.002, 0.008), True,
    )  # fmt: skip


def _ground(
    canvas: Canvas, rng: np.random.Generator, light: Light, street: _Street, x: Float, z: Float, rise: Float
) -> NDArray[np.int32]:
    """Paint numbers [rows, columns] of the empty scene: sky, road with its markings, pavement with kerb and slabs."""
    tar = rng.uniform(62, 158)
    warm, phase = rng.uniform(-9, 9), rng.uniform(0, 6, 2).tolist()
    road: Color = (tar + warm, tar + rng.uniform(-4, 4), tar - warm)
    stone = mix(
        (rng.uniform(66, 176),) * 3, pick(rng, ((150, 104, 84), (164, 150, 124), (120, 124, 128))), rng.random() * 0.8
    )
    white = mix(road, (226, 222, 206), rng.uniform(0.45, 0.95))
    sky = canvas.paint(light.horizon, SKY, 0.0)
    tarred = canvas.paint(road, ROAD, 0.06)
    worn = canvas.paint(scale(road, rng.uniform(0.82, 1.14)), ROAD, 0.07)
    marked = canvas.paint(white, ROAD, 0.08)
    paved = canvas.paint(stone, PAVEMENT, 0.08)
    seam = canvas.paint(scale(stone, rng.uniform(0.62, 0.8)), PAVEMENT, 0.08)
    kerb = canvas.paint(scale(mix(stone, (170, 168, 164), 0.5), rng.uniform(1.0, 1.25)), PAVEMENT, 0.05)
    across = np.abs(x)
    slab = rng.uniform(0.6, 1.3)
    seams = ((x % slab) < 0.07) | ((z % slab) < 0.08)
    paint = np.where(seams & (z < 24), seam, paved)
    paint = np.where(across < street.road + 0.22, kerb, paint)
    side = (z > street.crossing[0]) & (z < street.crossing[1])
    on_road = (across < street.road) | side
    patch = (np.sin(x * 1.3 + phase[0]) * np.sin(z * 0.35 + phase[1])) > rng.uniform(0.55, 0.95)
    paint = np.where(on_road, np.where(patch, worn, tarred), paint)
    paint = np.where(_markings(rng, street, x, z) & on_road, marked, paint)
    result: NDArray[np.int32] = np.where(rise >= -1e-4, sky, paint).astype(np.int32)
    return result


def _markings(rng: np.random.Generator, street: _Street, x: Float, z: Float) -> NDArray[np.bool_]:
    """Where the road is painted: a broken centre line, edge lines, a crossing for people."""
    across = np.abs(x)
    period, wide = rng.uniform(4, 8), rng.uniform(0.08, 0.14)
    lines = (across < wide) & ((z % period) < period * 0.5)
    if rng.random() < 0.5:
        lines |= np.abs(across - street.road + 0.45) < wide * 0.7
    lines &= (z < street.crossing[0]) | (z > street.crossing[1])
    if rng.random() < 0.45:
        start = street.crossing[0] - 4.5 if street.crossing[0] < FAR_M else rng.uniform(5, 22)
        zebra = (z > start) & (z < start + 3.2)
        lines = (lines & ~zebra) | (zebra & (((x + 50) % 1.1) < 0.55) & (across < street.road - 0.2))
    return lines


def _houses(canvas: Canvas, rng: np.random.Generator, light: Light, street: _Street) -> None:
    """Both rows of houses from the far end to the camera, with gaps where trees stand, and what closes the street."""
    typical = rng.uniform(5, 17)
    if rng.random() < 0.7:
        for side in (-1, 1):
            building(
                canvas,
                rng,
                light,
                side,
                side * rng.uniform(-2, 1),
                street.end,
                street.end + 12,
                typical * rng.uniform(0.7, 1.6),
            )
    for side in (-1, 1):
        plots, z = [], -8.0
        while z < street.end:
            length = rng.uniform(6, 15)
            if z < street.crossing[1] and z + length > street.crossing[0]:
                if street.crossing[0] - z > 4:
                    plots.append((z, street.crossing[0] - 0.5))
                z = street.crossing[1] + 0.5
                continue
            plots.append((z, z + length))
            z += length
        gaps = rng.uniform(0.02, 0.4)
        for z0, z1 in reversed(plots):
            wall = side * (street.walls + (rng.uniform(0, 2) if rng.random() < 0.3 else 0.0))
            if rng.random() < gaps:
                for _ in range(int(rng.integers(0, 4))):
                    tree(canvas, rng, light, wall + side * rng.uniform(1, 5), rng.uniform(max(z0, 2.0), max(z1, 4.0)))
            elif z1 > 0.5:
                tall = float(np.clip(typical * rng.uniform(0.55, 1.5), 3.6, 26))
                building(canvas, rng, light, side, wall, z0, z1, tall)


def _things(canvas: Canvas, rng: np.random.Generator, light: Light, street: _Street) -> None:
    """Trees, cars, people and poles, placed along the street and drawn from far to near."""
    camera_x = float(canvas.camera.position[0])
    things: list[tuple[float, int, float, float]] = []  # z, kind, x, turn
    kerb = street.road + 0.55
    for side in (-1.0, 1.0):
        if rng.random() < 0.5:
            things += [(z, 0, side * (kerb + 0.5), 0.0) for z in _row(rng, 5, 50, 6, 12)]
        if rng.random() < 0.65:
            heading = 0.0 if side > 0 or rng.random() < 0.5 else math.pi
            lane = side * (street.road - 1.1)
            first = 5.5 if abs(camera_x - lane) > 1.8 else 8.0
            things += [(z, 1, lane, heading + rng.normal(0, 0.03)) for z in _row(rng, first, 45, 5.6, 16)]
        things += [(z, 3, side * kerb, side) for z in _row(rng, 3.4, 18, 3, 9)]
    for _ in range(int(rng.integers(0, 3))):
        lane = float(rng.choice([-1.0, 1.0]))
        things.append(
            (rng.uniform(7, 32), 1, lane * street.road * 0.4, (0.0 if lane > 0 else math.pi) + rng.normal(0, 0.05))
        )
    if street.crossing[0] < 30 and rng.random() < 0.6:
        turn = float(rng.choice([-1.0, 1.0])) * math.pi / 2
        things.append(
            (sum(street.crossing) / 2, 1, rng.uniform(-street.walls, street.walls), turn + rng.normal(0, 0.1))
        )
    for _ in range(int(rng.integers(3, 8))):
        z = 3.2 + 7.5 * rng.random() ** 1.2
        if rng.random() < 0.75:
            x = float(rng.choice([-1.0, 1.0])) * rng.uniform(street.road + 0.4, street.walls - 0.3)
        else:
            x = rng.uniform(-street.road, street.road)
        things.append((z, 2, x, 0.0))
    taken: list[tuple[float, float]] = [(z, x) for z, kind, x, _ in things if kind == 1]
    for z, kind, x, turn in sorted(things, reverse=True):
        crowded = kind == 2 and any(abs(z - cz) < 2.6 and abs(x - cx) < 1.3 for cz, cx in taken)
        in_side_street = kind in (0, 3) and street.crossing[0] - 1 < z < street.crossing[1] + 1
        if crowded or in_side_street or (abs(x - camera_x) < 1.0 and z < 4):
            continue
        if kind == 0:
            tree(canvas, rng, light, x, z)
        elif kind == 1:
            car(canvas, rng, light, x, z, turn)
        elif kind == 2:
            person(canvas, rng, light, x, z)
        else:
            pole(canvas, rng, light, x, z, int(turn))


def _row(rng: np.random.Generator, first: float, last: float, low: float, high: float) -> list[float]:
    """Places along the street, `low` to `high` metres apart."""
    places, z = [], first + rng.uniform(0, high - low)
    while z < last:
        places.append(z)
        z += rng.uniform(low, high)
    return places


def _develop(
    canvas: Canvas, rng: np.random.Generator, light: Light, index: NDArray[np.int32], shade: Float, rise: Float
) -> NDArray[np.uint8]:
    """The photo: paint colours, sky, shadows, texture and light, then the lens and the sensor."""
    classes = np.array(canvas.classes, dtype=np.uint8)[index]
    photo = np.array(canvas.colors, dtype=np.float32)[index]
    rough = np.array(canvas.roughness, dtype=np.float32)[index]
    grain = _noise(rng, index.shape, (96, 48, 24), (0.5, 0.35, 0.3))
    fine = rng.standard_normal(index.shape, dtype=np.float32)
    leaves = classes == TREE
    sky = classes == SKY
    texture = np.where(leaves, 0.45 * grain + 0.6 * fine, 0.7 * grain + 0.6 * fine)
    ground = (classes == ROAD) | (classes == PAVEMENT)
    patchy = _noise(rng, index.shape, (6, 14), (0.6, 0.4))
    factor = 1.0 + rough * texture + np.where(sky, 0.0, 0.05) * patchy
    factor *= np.where(ground, shade, 1.0)
    photo *= factor[..., None]
    photo[sky] = _sky(rng, light, rise, index.shape)[sky]
    photo *= np.where(sky[..., None], np.float32(1.0), np.array(light.sun, dtype=np.float32))
    rows, columns = index.shape[0] // SUPERSAMPLING, index.shape[1] // SUPERSAMPLING
    photo = photo.reshape(rows, SUPERSAMPLING, columns, SUPERSAMPLING, 3).mean(axis=(1, 3))
    contrast, lift = rng.uniform(0.85, 1.12), rng.uniform(-10, 14)
    photo = (photo - 118) * contrast + 118 + lift
    photo += rng.standard_normal(photo.shape, dtype=np.float32) * rng.uniform(1.0, 4.0)
    return np.clip(photo + 0.5, 0, 255).astype(np.uint8)


def _sky(rng: np.random.Generator, light: Light, rise: Float, shape: tuple[int, ...]) -> Float:
    """RGB [rows, columns, 3]: from the horizon to the zenith, with clouds."""
    up = np.clip(rise * 2.2, 0, 1)[..., None] ** np.float32(0.7)
    horizon, zenith, cloud = (np.array(c, dtype=np.float32) for c in (light.horizon, light.zenith, light.cloud))
    clear = horizon + (zenith - horizon) * up
    field = _noise(rng, shape, (3, 7, 15), (0.6, 0.35, 0.2), stretch=2.0)
    cover = np.clip((field + (light.clouds - 0.5) * 2.2) * 0.9, 0, 1)[..., None] * np.float32(0.8)
    return np.asarray(clear + (cloud - clear) * cover, dtype=np.float32)


def _noise(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    cells: tuple[int, ...],
    weights: tuple[float, ...],
    stretch: float = 1.0,
) -> Float:
    """Smooth noise [rows, columns] of about unit spread: `cells` across the image's height, one octave each."""
    total = np.zeros(shape, dtype=np.float32)
    for cell, weight in zip(cells, weights, strict=True):
        wide = max(2, round(cell * shape[1] / shape[0] / stretch))
        field = Image.fromarray(rng.standard_normal((cell, wide), dtype=np.float32))
        total += np.float32(weight * 1.6) * np.asarray(field.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    return total


def _majority(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class that most of each 2 × 2 block of sub-pixels shows; uint8 [rows / 2, columns / 2]."""
    a, b, c, d = classes[::2, ::2], classes[::2, 1::2], classes[1::2, ::2], classes[1::2, 1::2]
    result: NDArray[np.uint8] = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where((a == b) | (a == c) | (a == d), a, result)
