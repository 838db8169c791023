"""A camera in a street, and the canvas it is drawn on.

A scene is drawn once, as an index image: every polygon writes the number of a paint, and a paint is a colour, a class
and a roughness. Photo and label are both looked up from that one image, so the label is exact by construction.

World: metres, x to the right across the street, y up, z along the street; the ground is y = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Float = NDArray[np.float32]
Color = tuple[float, float, float]
Point = tuple[float, float, float]

NEAR_M = 0.4  # nothing nearer to the lens is drawn
FAR_M = 400.0


def mix(first: Color, second: Color, share: float) -> Color:
    """`first` blended with a `share` of `second`."""
    a, b, c = (p + (q - p) * share for p, q in zip(first, second, strict=True))
    return (a, b, c)


def scale(color: Color, factor: float) -> Color:
    """`color` times `factor`."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


class Camera:
    """A pinhole camera at (x, height_m, 0); angles in radians, `focal` in pixels of a `rows` × `columns` image.

    Positive pitch looks down, positive yaw looks to the right.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        focal: float,
        x: float,
        height_m: float,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
    ) -> None:
        self.rows, self.columns, self.focal = rows, columns, focal
        self.position = np.array([x, height_m, 0.0])
        cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
        turn = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        tilt = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        self.rotation = lean @ tilt @ turn
        self.right = (cy, 0.0, -sy)
        self._rows: list[list[float]] = self.rotation.tolist()
        self._position: list[float] = self.position.tolist()

    def view(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """World points [..., 3] in the camera's frame (right, up, depth), metres."""
        seen: NDArray[np.float64] = (points - self.position) @ self.rotation.T
        return seen

    def pixels(self, seen: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points in the camera's frame [..., 3] as (column, row) [..., 2]."""
        factor = self.focal / seen[..., 2]
        return np.stack([self.columns / 2 + seen[..., 0] * factor, self.rows / 2 - seen[..., 1] * factor], axis=-1)

    def outline(self, points: Sequence[Point]) -> list[float]:
        """A polygon of world points as column, row, column, row, ...; empty where all of it is behind the lens."""
        # Plain arithmetic: for a handful of points numpy's calls cost several times the work.
        (a, b, c), (d, e, f), (g, h, i) = self._rows
        px, py, pz = self._position
        seen = []
        for x, y, z in points:
            x, y, z = x - px, y - py, z - pz
            seen.append((a * x + b * y + c * z, d * x + e * y + f * z, g * x + h * y + i * z))
        if min(point[2] for point in seen) < NEAR_M:
            seen = _clip(seen)
        flat: list[float] = []
        for right, up, depth in seen:
            factor = self.focal / depth
            flat += (self.columns / 2 + right * factor, self.rows / 2 - up * factor)
        return flat

    def depth(self, x: float, z: float) -> float:
        """Distance along the optical axis of the ground point (x, z), metres."""
        return float(self.rotation[2] @ (np.array([x, 0.0, z]) - self.position))

    def ground(self) -> tuple[Float, Float, Float]:
        """Per pixel: x and z of the ground it sees (FAR_M where it sees none), and the sine of its elevation."""
        columns = (np.arange(self.columns, dtype=np.float32) + 0.5 - self.columns / 2) / self.focal
        rows = (self.rows / 2 - np.arange(self.rows, dtype=np.float32) - 0.5) / self.focal
        inverse = self.rotation.astype(np.float32)
        ray_x, ray_y, ray_z = (
            columns[None, :] * inverse[0, axis] + rows[:, None] * inverse[1, axis] + inverse[2, axis]
            for axis in range(3)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(ray_y < -1e-4, np.float32(-self.position[1]) / ray_y, FAR_M)
        reach = np.minimum(reach, FAR_M)
        length = np.sqrt(ray_x * ray_x + ray_y * ray_y + ray_z * ray_z)
        return ray_x * reach + np.float32(self.position[0]), ray_z * reach, ray_y / length


class Canvas:
    """An index image of paints and a shadow image, filled with polygons given in the world."""

    def __init__(self, camera: Camera, haze: Color, haze_per_m: float) -> None:
        self.camera = camera
        self.haze, self.haze_per_m = haze, haze_per_m
        self.colors: list[Color] = []
        self.classes: list[int] = []
        self.roughness: list[float] = []
        self._index = Image.new("I", (camera.columns, camera.rows))
        self._shade = Image.new("L", (camera.columns, camera.rows), 255)
        self._draw = ImageDraw.Draw(self._index)
        self._draw_shade = ImageDraw.Draw(self._shade)

    def start(self, index: NDArray[np.int32]) -> None:
        """Begin on `index` [rows, columns]: the paint of every pixel of sky and ground."""
        self._index = Image.fromarray(index)
        self._draw = ImageDraw.Draw(self._index)

    def paint(self, color: Color, class_id: int, rough: float = 0.05, depth: float = 0.0) -> int:
        """A new paint; `rough` is the contrast of its texture, `depth` in metres fades it into the haze."""
        veil = 1.0 - math.exp(-max(depth, 0.0) * self.haze_per_m)
        self.colors.append(mix(color, self.haze, veil))
        self.classes.append(class_id)
        self.roughness.append(rough * (1.0 - veil))
        return len(self.colors) - 1

    def polygon(self, points: Sequence[Point], paint: int) -> None:
        """Fill a planar polygon of world points."""
        outline = self.camera.outline(points)
        if outline:
            self._draw.polygon(outline, fill=paint)

    def quads(self, quads: NDArray[np.float64], paints: Sequence[int]) -> None:
        """Fill many quadrilaterals [n, 4, 3]; one that reaches behind the lens is left out."""
        seen = self.camera.view(quads)
        visible = seen[..., 2].min(axis=1) > NEAR_M
        corners = self.camera.pixels(np.where(visible[:, None, None], seen, 1.0)).reshape(len(quads), 8).tolist()
        for corner, paint, shown in zip(corners, paints, visible.tolist(), strict=True):
            if shown:
                self._draw.polygon(corner, fill=paint)

    def shadow(self, points: Sequence[Point], light: float) -> None:
        """Leave `light` (0..1) on the ground inside a polygon; the last shadow drawn on a spot counts."""
        outline = self.camera.outline(points)
        if outline:
            self._draw_shade.polygon(outline, fill=int(light * 255))

    def images(self) -> tuple[NDArray[np.int32], Float]:
        """The index image [rows, columns], and the light on the ground [rows, columns] in 0..1."""
        return np.asarray(self._index, dtype=np.int32), np.asarray(self._shade, dtype=np.float32) / 255.0


def _clip(seen: list[Point]) -> list[Point]:
    """The part of a polygon beyond NEAR_M (Sutherland and Hodgman, CACM 1974, against one plane)."""
    kept: list[Point] = []
    for (x, y, z), (u, v, w) in zip(seen, seen[1:] + seen[:1], strict=True):
        if z >= NEAR_M:
            kept.append((x, y, z))
        if (z >= NEAR_M) != (w >= NEAR_M):
            share = (NEAR_M - z) / (w - z)
            kept.append((x + (u - x) * share, y + (v - y) * share, NEAR_M))
    return kept
