"""What stands in a street of `sceneray.data.town`: buildings, trees, people, poles (cars: `town_cars`).

Each function draws one thing on a canvas, from far parts to near parts. Sizes are metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sceneray.data.town_canvas import Canvas, Color, Point, mix, scale

SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, POLE = range(8)

# Every palette holds greys, browns and greens, so that no class owns a colour.
WALLS: tuple[Color, ...] = (
    (196, 186, 168), (168, 104, 82), (136, 88, 70), (206, 196, 178), (150, 150, 150), (112, 116, 122),
    (178, 160, 120), (126, 134, 110), (96, 112, 92), (170, 186, 198), (146, 122, 98), (214, 206, 198),
    (124, 94, 74), (188, 148, 120), (92, 90, 92), (132, 150, 168), (108, 112, 70), (150, 138, 84),
    (84, 96, 62), (122, 104, 62), (186, 204, 222), (110, 140, 176), (200, 206, 210),
)  # fmt: skip
LEAVES: tuple[Color, ...] = (
    (74, 104, 52), (92, 118, 58), (60, 86, 60), (112, 120, 62), (150, 112, 54), (156, 84, 52), (104, 96, 66),
    (84, 100, 84), (132, 128, 84), (62, 74, 50), (122, 70, 62), (96, 92, 72), (120, 112, 84), (78, 104, 88),
)  # fmt: skip
NEEDLES: tuple[Color, ...] = ((58, 80, 60), (70, 88, 56), (74, 92, 88), (84, 86, 66))
BODIES: tuple[Color, ...] = (
    (206, 206, 206), (168, 170, 174), (116, 118, 122), (58, 60, 64), (150, 44, 40), (52, 78, 128), (76, 98, 70),
    (132, 110, 84), (176, 160, 124), (92, 112, 128), (104, 44, 46), (120, 132, 108), (196, 150, 60),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (60, 62, 70), (120, 118, 116), (176, 172, 164), (172, 44, 38), (48, 72, 142), (74, 112, 62), (134, 104, 76),
    (88, 116, 150), (196, 146, 52), (38, 40, 46), (206, 202, 198), (132, 58, 100), (40, 110, 116),
)  # fmt: skip
MASTS: tuple[Color, ...] = (
    (96, 98, 100), (60, 64, 66), (134, 134, 132), (74, 88, 74), (112, 92, 76), (160, 156, 148), (84, 92, 108),
)  # fmt: skip
SKIN: tuple[Color, ...] = ((214, 170, 140), (184, 136, 106), (136, 96, 72), (96, 68, 54))

CIRCLE = [(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)]


@dataclass(frozen=True)
class Light:
    """How a scene is lit. Factors multiply a surface's own colour."""

    sun: Color
    left: float
    """on facades left of the camera"""
    right: float
    ahead: float
    """on what faces the camera"""
    shadow: float
    """light left inside a cast shadow; 1: there are none"""
    cast: tuple[float, float]
    """where the top of a thing 1 m high throws its shadow: metres along x and z"""
    zenith: Color
    horizon: Color
    cloud: Color
    clouds: float
    """share of the sky under clouds"""
    haze_per_m: float
    lamps_on: bool


def pick(rng: np.random.Generator, palette: tuple[Color, ...], spread: float = 14.0) -> Color:
    """A colour of `palette`, lighter or darker and tinted a little."""
    r, g, b = palette[int(rng.integers(len(palette)))]
    factor = rng.uniform(0.78, 1.18)
    dr, dg, db = rng.uniform(-spread, spread, 3).tolist()
    return (r * factor + dr, g * factor + dg, b * factor + db)


def building(
    canvas: Canvas, rng: np.random.Generator, light: Light, side: int, x: float, z0: float, z1: float, height: float
) -> None:
    """A house on one `side` (-1 left, 1 right): the facade at `x` from `z0` to `z1`, and the wall facing the camera."""
    depth = max(z0, 0.0)
    wall = pick(rng, WALLS)
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


class Board:
    """A flat figure at (x, z) that faces the camera: points are (metres to the right, metres up)."""

    def __init__(self, canvas: Canvas, x: float, z: float) -> None:
        self.canvas, self.x, self.z = canvas, x, z
        self.depth = canvas.camera.depth(x, z)

    def polygon(self, points: list[tuple[float, float]], paint: int) -> None:
        """Fill an outline."""
        rx, rz = self.canvas.camera.right[0], self.canvas.camera.right[2]
        self.canvas.polygon([(self.x + u * rx, y, self.z + u * rz) for u, y in points], paint)

    def blob(self, u: float, y: float, wide: float, tall: float, paint: int, bumps: list[float] | None = None) -> None:
        """Fill an ellipse with half axes `wide` and `tall`; `bumps` are factors on its radius, one a corner."""
        radii = bumps or [1.0] * len(CIRCLE)
        points = [(u + wide * r * c, y + tall * r * s) for r, (c, s) in zip(radii, CIRCLE, strict=True)]
        self.polygon(points, paint)

    def stroke(
        self, start: tuple[float, float], stop: tuple[float, float], wide: float, paint: int, taper: float = 1.0
    ) -> None:
        """Fill a bar from `start` to `stop`, `wide` metres at the start and `wide * taper` at the stop."""
        du, dy = stop[0] - start[0], stop[1] - start[1]
        length = math.hypot(du, dy) or 1.0
        nu, ny = -dy / length * wide / 2, du / length * wide / 2
        self.polygon(
            [
                (start[0] + nu, start[1] + ny), (stop[0] + nu * taper, stop[1] + ny * taper),
                (stop[0] - nu * taper, stop[1] - ny * taper), (start[0] - nu, start[1] - ny),
            ],
            paint,
        )  # fmt: skip

    def shadow(self, light: Light, wide: float, low: float, high: float) -> None:
        """The shadow of an upright bar `wide` metres across from `low` to `high` metres up."""
        if light.shadow == 1:
            return
        rx, _, rz = self.canvas.camera.right
        corners = [(-wide / 2, low), (wide / 2, low), (wide / 2, high), (-wide / 2, high)]
        dx, dz = light.cast
        self.canvas.shadow(
            [(self.x + u * rx + dx * y, 0.0, self.z + u * rz + dz * y) for u, y in corners], light.shadow
        )

    def contact(self, wide: float, light: float = 0.62) -> None:
        """The dark patch under a thing `wide` metres across."""
        turn = 2 * math.pi / 12
        ring = [(self.x + wide * math.cos(i * turn), 0.0, self.z + wide * 0.7 * math.sin(i * turn)) for i in range(12)]
        self.canvas.shadow(ring, light)


def tree(canvas: Canvas, rng: np.random.Generator, light: Light, x: float, z: float) -> None:
    """A trunk under a crown of leaves in three tones, or a conifer."""
    board = Board(canvas, x, z)
    conifer = rng.random() < 0.15
    leaf, bark = (
        pick(rng, NEEDLES if conifer else LEAVES, 10),
        pick(rng, ((92, 74, 58), (112, 104, 96), (76, 66, 56)), 8),
    )
    radius, trunk = rng.uniform(1.3, 2.4), rng.uniform(0.28, 0.5)
    base = rng.uniform(2.0, 3.2)
    middle = base + radius * rng.uniform(0.75, 1.1)
    tones = [
        canvas.paint(scale(leaf, k), TREE, rough, board.depth) for k, rough in ((0.55, 0.5), (0.86, 0.5), (1.2, 0.45))
    ]
    stem = canvas.paint(scale(bark, light.ahead), TREE, 0.15, board.depth)
    board.contact(trunk)
    board.shadow(light, trunk, 0.0, base)
    board.shadow(light, radius * 1.8, base, middle + radius)
    board.stroke((0, 0), (rng.uniform(-0.2, 0.2), middle), trunk, stem, 0.6)
    if conifer:
        _conifer(board, rng, radius, base * 0.4, tones)
        return
    toward_sun = -math.copysign(0.35, light.cast[0]) * radius
    for tone, (count, spread, size, shift) in enumerate(
        ((7, 0.62, 0.62, 0.0), (8, 0.55, 0.44, 0.4), (7, 0.5, 0.26, 1.0))
    ):
        for _ in range(count):
            angle, reach = rng.uniform(0, 2 * math.pi), radius * spread * math.sqrt(rng.random())
            u = reach * math.cos(angle) + toward_sun * shift
            y = middle + reach * math.sin(angle) * 0.85 + radius * 0.22 * shift
            wide = radius * size * rng.uniform(0.75, 1.15)
            board.blob(
                u, y, wide, wide * rng.uniform(0.75, 1.0), tones[tone], rng.uniform(0.84, 1.14, len(CIRCLE)).tolist()
            )


def _conifer(board: Board, rng: np.random.Generator, radius: float, base: float, tones: list[int]) -> None:
    layers, top = 5, base + radius * rng.uniform(3.2, 4.2)
    for i in range(layers):
        low = base + (top - base) * i / (layers + 0.6)
        high = min(low + (top - base) * 0.42, top)
        wide = radius * 0.85 * (1 - i / (layers + 0.3))
        board.polygon([(-wide, low), (wide, low), (0, high)], tones[0])
        board.polygon([(-wide * 0.75, low + 0.08), (wide * 0.45, low + 0.05), (0, high)], tones[1 + i % 2])


def person(canvas: Canvas, rng: np.random.Generator, light: Light, x: float, z: float) -> None:
    """Somebody standing or walking, seen from any side."""
    board = Board(canvas, x, z)
    tall = rng.uniform(1.55, 1.9)
    k, lit = tall / 1.75, light.ahead
    wide = rng.uniform(1.05, 1.4) * k

    def cloth(palette: tuple[Color, ...], factor: float = 1.0) -> int:
        return canvas.paint(scale(pick(rng, palette), lit * factor), PERSON, 0.06, board.depth)

    top, bottom, skin = pick(rng, CLOTHES), pick(rng, CLOTHES), cloth(SKIN)
    coat, sleeve = (canvas.paint(scale(top, lit * f), PERSON, 0.08, board.depth) for f in (1.0, 0.8))
    legs = [canvas.paint(scale(bottom, lit * f), PERSON, 0.08, board.depth) for f in (0.75, 0.95)]
    shoe, hair = (
        cloth(((40, 36, 34), (70, 56, 46))),
        cloth(((44, 36, 30), (92, 68, 46), (150, 126, 92), (120, 118, 116))),
    )
    stride, swing = rng.uniform(0.04, 0.34) * k, rng.uniform(-0.22, 0.22) * k
    board.contact(0.35)
    board.shadow(light, 0.45, 0.0, tall)
    hip, neck = 0.88 * k, 1.45 * k
    for sign, leg in ((-1, legs[0]), (1, legs[1])):
        foot = (sign * stride, 0.06 * k)
        board.stroke((sign * 0.09 * wide, hip), foot, 0.23 * wide, leg, 0.72)
        board.stroke((foot[0] - 0.07, 0.04 * k), (foot[0] + 0.15, 0.04 * k), 0.1 * k, shoe)
    board.stroke((-0.2 * wide, neck - 0.08 * k), (-0.27 * wide - swing, 0.86 * k), 0.15 * wide, sleeve, 0.7)
    hem = rng.choice([0.82, 0.84, 0.55]) * k
    shoulder, waist = 0.24 * wide, (0.19 if hem > 0.7 else 0.26) * wide
    board.polygon(
        [
            (-waist, hem),
            (waist, hem),
            (shoulder, neck - 0.06 * k),
            (0.12 * wide, neck),
            (-0.12 * wide, neck),
            (-shoulder, neck - 0.06 * k),
        ],
        coat,
    )
    board.stroke((0.2 * wide, neck - 0.08 * k), (0.27 * wide + swing, 0.86 * k), 0.15 * wide, sleeve, 0.7)
    board.blob(-0.28 * wide - swing, 0.83 * k, 0.055, 0.06, skin)
    board.blob(0.28 * wide + swing, 0.83 * k, 0.055, 0.06, skin)
    if rng.random() < 0.3:
        board.blob(rng.choice([-0.3, 0.3]) * wide, 0.72 * k, 0.15, 0.19, cloth(CLOTHES))
    board.stroke((0, neck - 0.03), (0, neck + 0.1 * k), 0.1 * wide, skin)
    board.blob(0, tall - 0.14 * k, 0.115 * k, 0.15 * k, skin)
    board.blob(0, tall - 0.07 * k, 0.125 * k, 0.1 * k, hair)


def pole(canvas: Canvas, rng: np.random.Generator, light: Light, x: float, z: float, side: int) -> None:
    """A street lamp, a traffic light, a sign or a bare post at the kerb; what it carries belongs to it."""
    board = Board(canvas, x, z)
    color = pick(rng, MASTS, 10)
    mast = canvas.paint(scale(color, light.ahead), POLE, 0.06, board.depth)
    dark = canvas.paint(scale(color, light.ahead * 0.5), POLE, 0.04, board.depth)
    wide = rng.uniform(0.3, 0.46)
    board.contact(wide * 0.8)
    kind = rng.integers(4)
    tall = (rng.uniform(5.0, 8.0), rng.uniform(3.0, 3.8), rng.uniform(2.5, 3.2), rng.uniform(3.5, 9.0))[kind]
    board.shadow(light, wide, 0.0, tall)
    board.stroke((0, 0), (0, 0.5), wide * 1.5, dark)
    board.stroke((0, 0), (0, tall), wide, mast, 0.75)
    board.stroke((wide * 0.25, 0.5), (wide * 0.2, tall), wide * 0.3, dark, 0.75)
    if kind == 0:
        reach = -side * rng.uniform(1.0, 1.9)
        board.stroke((0, tall - 0.1), (reach, tall + 0.35), wide * 0.7, mast)
        lamp = (255, 240, 196) if light.lamps_on else scale((222, 220, 206), light.ahead)
        board.blob(reach, tall + 0.24, 0.42, 0.16, canvas.paint(lamp, POLE, 0.0, board.depth))
    elif kind == 1:
        board.polygon([(-0.24, tall - 0.2), (0.24, tall - 0.2), (0.24, tall + 0.9), (-0.24, tall + 0.9)], dark)
        lit = int(rng.integers(3))
        for i, glow in enumerate(((226, 60, 44), (236, 176, 60), (70, 190, 110))):
            lens = canvas.paint(glow if i == lit else scale(glow, 0.25), POLE, 0.0, board.depth)
            board.blob(0, tall + 0.7 - 0.35 * i, 0.13, 0.13, lens)
    elif kind == 2:
        _sign(board, canvas, rng, light, tall)


def _sign(board: Board, canvas: Canvas, rng: np.random.Generator, light: Light, tall: float) -> None:
    border, face = (
        ((190, 44, 40), (232, 230, 224)), ((44, 82, 150), (44, 82, 150)), ((236, 232, 224), (52, 110, 80)),
        ((60, 60, 60), (222, 180, 60)),
    )[int(rng.integers(4))]  # fmt: skip
    outer, inner = (canvas.paint(scale(c, light.ahead), POLE, 0.02, board.depth) for c in (border, face))
    corners = int(rng.choice([3, 4, 14]))
    size = rng.uniform(0.36, 0.48)
    for radius, paint in ((size, outer), (size * 0.72, inner)):
        turn = 2 * math.pi / corners
        start = math.pi / 2 if corners == 3 else math.pi / 4
        board.polygon(
            [(radius * math.cos(start + i * turn), tall + radius * math.sin(start + i * turn)) for i in range(corners)],
            paint,
        )
