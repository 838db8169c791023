"""Houses: a facade along the street, a wall that faces the camera, a roof, windows, shops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sceneray.data.townscape.canvas import Canvas, Color, Point, mix, scale
from sceneray.data.townscape.look import BODIES, BUILDING, CLOTHES, LEAVES, WALLS, Light, pick


def building(
    canvas: Canvas, rng: np.random.Generator, light: Light, side: int, x: float, z0: float, z1: float, height: float
) -> None:
    """A house on one `side` (-1 left, 1 right): the facade at `x` from `z0` to `z1`, and the wall facing the camera."""
    depth = max(z0, 0.0)
    wall = _wall_color(rng, light)
    across = x + side * rng.uniform(8, 14)
    facing = light.left if side < 0 else light.right
    rough = rng.uniform(0.01, 0.05)
    front = canvas.paint(scale(wall, facing), BUILDING, rough, depth)
    end = canvas.paint(scale(wall, light.ahead), BUILDING, rough, depth)
    trim = canvas.paint(scale(mix(wall, (225, 220, 210), rng.uniform(-0.5, 0.6)), facing), BUILDING, 0.02, depth)
    if rng.random() < 0.55:
        _pitched_roof(canvas, rng, light, side, x, across, z0, z1, height, depth, end)
    canvas.polygon([(x, 0, z0), (across, 0, z0), (across, height, z0), (x, height, z0)], end)
    canvas.polygon([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], front)
    if light.shadow < 1:
        dx, dz = light.cast[0] * height, light.cast[1] * height
        canvas.shadow([(x, 0, z0), (x, 0, z1), (x + dx, 0, z1 + dz), (x + dx, 0, z0 + dz)], light.shadow)
    facade = Wall((x, 0.0, 0.0), (0.0, 0.0, 1.0), z0, z1, height)
    floor = rng.uniform(2.9, 3.6)
    bands = [(0.0, rng.uniform(0.3, 0.8)), (height - 0.35, height)]  # a plinth and a cornice
    if rng.random() < 0.5:
        bands += [(y - 0.12, y + 0.12) for y in np.arange(floor, height - 1.5, floor)]
    low, high = np.array(bands).T
    canvas.quads(facade.rectangles(np.full(len(low), z0), np.full(len(low), z1), low, high), [trim] * len(low))
    panes = _panes(canvas, rng, light, wall, facing, depth)
    _windows(canvas, rng, panes, floor, facade)
    if rng.random() < 0.5:
        _shop_sign(canvas, rng, facing, depth, floor, facade)
    if rng.random() < 0.5:
        near, far = sorted((x, across))
        _windows(canvas, rng, panes, floor, Wall((0.0, 0.0, z0), (1.0, 0.0, 0.0), near, far, height))


@dataclass(frozen=True)
class Wall:
    """An upright plane through `origin` in the direction `along`, from `start` to `stop` and up to `height`."""

    origin: Point
    along: Point
    start: float
    stop: float
    height: float

    def rectangles(
        self,
        first: NDArray[np.float64],
        last: NDArray[np.float64],
        low: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Rectangles [n, 4, 3] between `first` and `last` metres along the wall and `low` and `high` metres up."""
        along, up = np.array(self.along), np.array([0.0, 1.0, 0.0])
        corners = [(first, low), (last, low), (last, high), (first, high)]
        return np.stack([np.array(self.origin) + s[:, None] * along + y[:, None] * up for s, y in corners], axis=1)


def _wall_color(rng: np.random.Generator, light: Light) -> Color:
    """Mostly plaster, brick and stone; now and then as green or brown as a tree, or as pale as the sky above."""
    kind = rng.random()
    if kind < 0.14:
        return pick(rng, LEAVES)
    if kind < 0.24:
        return mix(light.zenith, light.horizon, rng.uniform(0.3, 1.0))
    return pick(rng, WALLS)


def _pitched_roof(
    canvas: Canvas, rng: np.random.Generator, light: Light, side: int, x: float, across: float,
    z0: float, z1: float, height: float, depth: float, gable: int,
) -> None:  # fmt: skip
    ridge = height + rng.uniform(2.0, 4.5)
    tile = canvas.paint(scale(pick(rng, WALLS[1:9]), 0.8 * light.ahead), BUILDING, 0.12, depth)
    middle, eaves = (x + across) / 2, x - side * 0.3
    canvas.polygon([(eaves, height, z0), (eaves, height, z1), (middle, ridge, z1), (middle, ridge, z0)], tile)
    canvas.polygon([(x, height - 0.02, z0), (across, height - 0.02, z0), (middle, ridge, z0)], gable)


def _panes(
    canvas: Canvas, rng: np.random.Generator, light: Light, wall: Color, facing: float, depth: float
) -> list[int]:
    """Paints for one house's windows: dark glass, glass that mirrors the sky, blinds, and lamplight at dusk."""
    dark = scale(mix((44, 50, 58), light.horizon, rng.uniform(0, 0.25)), 0.9)
    mirrored = mix(dark, mix(light.zenith, light.horizon, 0.5), rng.uniform(0.3, 0.9))
    blind = scale(mix(wall, (200, 196, 186), 0.6), facing * 0.85)
    colors = [dark, dark, mirrored, mix(dark, mirrored, 0.5), blind]
    if light.lamps_on:
        colors += [(246, 214, 140), (232, 190, 112), (250, 228, 176)]
    return [canvas.paint(color, BUILDING, 0.02, depth) for color in colors]


def _shop_sign(canvas: Canvas, rng: np.random.Generator, facing: float, depth: float, floor: float, wall: Wall) -> None:
    """A painted board or an awning above the ground floor, as bright as a coat or a car."""
    paint = canvas.paint(scale(pick(rng, CLOTHES if rng.random() < 0.5 else BODIES), facing), BUILDING, 0.03, depth)
    first = wall.start + rng.uniform(0, 0.4) * (wall.stop - wall.start)
    last = first + rng.uniform(0.4, 1.0) * (wall.stop - first)
    low = floor * rng.uniform(0.68, 0.8)
    ends = (np.array([value]) for value in (first, last, low, low + rng.uniform(0.5, 1.1)))
    canvas.quads(wall.rectangles(*ends), [paint])


def _windows(canvas: Canvas, rng: np.random.Generator, panes: list[int], floor: float, wall: Wall) -> None:
    pitch, wide = rng.uniform(1.9, 3.2), rng.uniform(0.42, 0.72)
    tall, sill = rng.uniform(0.42, 0.66) * floor, rng.uniform(0.2, 0.3) * floor
    columns = np.arange(wall.start + pitch * 0.35, wall.stop - pitch * wide - 0.2, pitch)
    rows = np.arange(0.0, wall.height - floor * 0.9, floor)
    if not len(columns) or not len(rows):
        return
    left, low = np.tile(columns, len(rows)), np.repeat(rows + sill, len(columns))
    high, widths = low + tall, np.full(len(left), pitch * wide)
    if rng.random() < 0.45:  # a shop: glass down to the pavement
        ground = low < floor
        low, high = np.where(ground, 0.45, low), np.where(ground, floor * 0.82, high)
        widths = np.where(ground, pitch * 0.86, widths)
    chosen = [panes[i] for i in rng.integers(len(panes), size=len(left)).tolist()]
    canvas.quads(wall.rectangles(left, left + widths, low, high), chosen)
