"""What stands upright and is drawn as a flat figure that faces the camera: trees, people, poles. Sizes are metres."""

from __future__ import annotations

import math

import numpy as np

from sceneray.data.townscape.canvas import Canvas, Color, scale
from sceneray.data.townscape.look import (
    CLOTHES,
    LEAVES,
    MASTS,
    NEEDLES,
    PERSON,
    POLE,
    SKIN,
    TREE,
    Light,
    pick,
)  # fmt: skip

CIRCLE = [(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)]


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
        canvas.paint(scale(leaf, k), TREE, rough, board.depth) for k, rough in ((0.64, 0.42), (0.9, 0.42), (1.18, 0.42))
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
