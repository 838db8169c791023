"""Cars and vans: a side profile, drawn out to the car's width, in perspective."""

from __future__ import annotations

import itertools
import math

import numpy as np

from sceneray.data.townscape.canvas import Canvas, Point, mix, scale
from sceneray.data.townscape.look import BODIES, CAR, Light, pick

# Side profiles from the rear bumper over the roof to the front bumper: (metres forward, metres up). `g` marks the
# edges of glass that begin at a point: the rear window and the windscreen.
PROFILES: tuple[tuple[tuple[float, float, str], ...], ...] = (
    ((-2.1, 0.3, ""), (-2.15, 0.95, ""), (-1.5, 1.02, "g"), (-0.85, 1.44, ""), (0.35, 1.44, "g"), (1.0, 0.98, ""),
     (2.05, 0.8, ""), (2.12, 0.3, "")),
    ((-1.85, 0.3, ""), (-1.92, 0.98, "g"), (-1.55, 1.48, ""), (0.25, 1.5, "g"), (0.95, 1.0, ""), (1.8, 0.84, ""),
     (1.9, 0.3, "")),
    ((-2.2, 0.38, ""), (-2.25, 1.1, "g"), (-2.0, 1.68, ""), (0.3, 1.72, "g"), (1.0, 1.14, ""), (2.1, 1.02, ""),
     (2.2, 0.38, "")),
    ((-2.5, 0.38, ""), (-2.55, 2.1, ""), (1.3, 2.15, "g"), (2.0, 1.25, ""), (2.5, 1.1, ""), (2.55, 0.38, "")),
)  # fmt: skip


class Frame:
    """A car's own axes: s forward along its heading, r to its right, y up, from (x, z) on the ground."""

    def __init__(self, canvas: Canvas, x: float, z: float, heading: float) -> None:
        self.x, self.z = x, z
        self.forward = (math.sin(heading), math.cos(heading))
        eye = canvas.camera.position
        dx, dz = float(eye[0]) - x, float(eye[2]) - z
        self.eye_s = dx * self.forward[0] + dz * self.forward[1]
        self.eye_r = dx * self.forward[1] - dz * self.forward[0]
        self.eye_y = float(eye[1])

    def point(self, s: float, r: float, y: float) -> Point:
        """World coordinates of a point of the car."""
        return (
            self.x + s * self.forward[0] + r * self.forward[1],
            y,
            self.z + s * self.forward[1] - r * self.forward[0],
        )


def car(canvas: Canvas, rng: np.random.Generator, light: Light, x: float, z: float, heading: float) -> None:
    """A car at (x, z); heading 0 drives away from the camera, π towards it."""
    frame, depth = Frame(canvas, x, z, heading), canvas.camera.depth(x, z)
    shape = int(rng.choice(len(PROFILES), p=(0.3, 0.3, 0.25, 0.15)))
    profile, half = PROFILES[shape], rng.uniform(0.86, 0.96)
    color = pick(rng, BODIES, 8)
    glass = scale(mix((40, 46, 54), mix(light.zenith, light.horizon, 0.5), rng.uniform(0.1, 0.6)), 0.95)
    paints = {
        name: canvas.paint(tint, CAR, rough, depth)
        for name, tint, rough in (
            ("top", scale(mix(color, light.zenith, 0.12), 1.12), 0.03),
            ("end", scale(color, light.ahead), 0.03),
            ("side", scale(color, light.left if frame.eye_r > 0 else light.right), 0.03),
            ("low", scale(color, 0.55 * light.ahead), 0.03),
            ("glass", glass, 0.02),
            ("pane", scale(glass, 0.82), 0.02),
            ("dark", (30, 30, 32), 0.05),
            ("rim", (150, 152, 154), 0.05),
            ("tail", (238, 56, 40) if light.lamps_on else (172, 36, 32), 0.0),
            ("head", (255, 246, 214) if light.lamps_on else (222, 224, 220), 0.0),
        )
    }
    canvas.shadow([frame.point(s, r, 0) for s, r in ((-2.4, -1.0), (-2.4, 1.0), (2.4, 1.0), (2.4, -1.0))], 0.42)
    if light.shadow < 1:
        dx, dz = light.cast[0] * 1.2, light.cast[1] * 1.2
        base = [frame.point(s, r, 0) for s, r in ((-2, -0.8), (-2, 0.8), (1.6, 0.8), (1.6, -0.8))]
        canvas.shadow([(px + dx, 0.0, pz + dz) for px, _, pz in base], light.shadow)
    _ends(canvas, frame, profile, half, paints)
    _side(canvas, frame, profile, half, paints, van=shape == 3)


def _half_at(y: float, half: float) -> float:
    """Half of the width at height `y`: the cabin leans inwards."""
    return half * (1.0 - 0.16 * max(y - 1.0, 0.0) / 0.5) if y < 1.8 else half * 0.9


def _ends(
    canvas: Canvas, frame: Frame, profile: tuple[tuple[float, float, str], ...], half: float, paints: dict[str, int]
) -> None:
    """The faces across the car that the camera sees (rear or front, windows, roof), far ones first."""
    sees_rear = frame.eye_s < 0
    edges = list(itertools.pairwise(profile))
    for (s0, y0, mark), (s1, y1, _) in reversed(edges) if sees_rear else edges:
        # The outward normal of an edge that runs clockwise is (-dy, ds).
        if (frame.eye_s - s0) * -(y1 - y0) + (frame.eye_y - y0) * (s1 - s0) <= 0:
            continue
        steep = abs(y1 - y0) > abs(s1 - s0)
        name = "glass" if mark else ("end" if steep else "top")
        h0, h1 = _half_at(y0, half), _half_at(y1, half)
        canvas.polygon(
            [frame.point(s, r, y) for s, r, y in ((s0, -h0, y0), (s0, h0, y0), (s1, h1, y1), (s1, -h1, y1))],
            paints[name],
        )
    s, low = profile[0][0] if sees_rear else profile[-1][0], profile[0][1]
    high = min(profile[1][1] if sees_rear else profile[-2][1], 1.1)

    def patch(r0: float, r1: float, y0: float, y1: float, name: str) -> None:
        out = s - 0.03 if sees_rear else s + 0.03
        canvas.polygon([frame.point(out, r, y) for r, y in ((r0, y0), (r1, y0), (r1, y1), (r0, y1))], paints[name])

    for r in (-half * 0.95, half * 0.7):
        patch(r, r + half * 0.25, 0.0, low + 0.05, "dark")
    patch(-half * 0.97, half * 0.97, low - 0.08, low + 0.16, "low")
    lamp = low + (high - low) * 0.62
    for r in (-half * 0.95, half * 0.62):
        patch(r, r + half * 0.33, lamp, lamp + 0.17, "tail" if sees_rear else "head")
    patch(-0.26, 0.26, low + 0.2, low + 0.32, "rim")
    if sees_rear and profile[1][1] > 1.8:  # a van's rear windows
        for r in (-half * 0.8, half * 0.08):
            patch(r, r + half * 0.72, 1.25, 1.85, "pane")


def _side(
    canvas: Canvas, frame: Frame, profile: tuple[tuple[float, float, str], ...], half: float,
    paints: dict[str, int], van: bool,
) -> None:  # fmt: skip
    """The long side that the camera sees: body, windows, wheels."""
    if abs(frame.eye_r) <= half:
        return
    sign = math.copysign(1.0, frame.eye_r)

    def place(s: float, y: float) -> Point:
        return frame.point(s, sign * _half_at(y, half), y)

    canvas.polygon([place(s, y) for s, y, _ in profile], paints["side"])
    marks = [i for i, point in enumerate(profile) if point[2]]
    belt = 1.02 if not van else 1.3
    front = profile[marks[-1]]
    roof = front[1] - 0.09
    after = profile[marks[-1] + 1]
    slope = (after[0] - front[0]) / max(front[1] - after[1], 0.1)
    if van:
        panes = [(0.45, front[0] - 0.1, front[0] + slope * (front[1] - belt) - 0.1)]
    else:
        rear_s, _, _ = profile[marks[0]]
        top_s = profile[marks[0] + 1][0]
        panes = [
            (max(rear_s + 0.25, top_s - 0.35), -0.42, -0.42),
            (-0.3, front[0] - 0.05, front[0] + slope * (front[1] - belt) - 0.2),
        ]
    for start, top, bottom in panes:
        lead = 0.0 if start > -0.5 else 0.3
        canvas.polygon(
            [place(start, belt), place(bottom, belt), place(top, roof), place(start + lead, roof)], paints["pane"]
        )
    line = profile[0][1]
    canvas.polygon(
        [
            place(profile[0][0], line),
            place(profile[-1][0], line),
            place(profile[-1][0], line + 0.16),
            place(profile[0][0], line + 0.16),
        ],
        paints["low"],
    )
    for s in (profile[0][0] + 0.75, profile[-1][0] - 0.72):
        for radius, name in ((0.38, "dark"), (0.2, "rim")):
            turn = 2 * math.pi / 14
            wheel = [(s + radius * math.cos(i * turn), 0.33 + radius * math.sin(i * turn)) for i in range(14)]
            canvas.polygon([frame.point(u, sign * (half + 0.02), max(y, 0.0)) for u, y in wheel], paints[name])
