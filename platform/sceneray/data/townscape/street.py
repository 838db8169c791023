"""The street's plan, its ground, and where houses and things stand along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sceneray.data.townscape.canvas import FAR_M, Camera, Canvas, Color, Float, mix, scale
from sceneray.data.townscape.cars import car
from sceneray.data.townscape.figures import person, pole, tree
from sceneray.data.townscape.houses import building
from sceneray.data.townscape.look import PAVEMENT, ROAD, SKY, Light, pick


@dataclass(frozen=True)
class Street:
    """The street's plan in metres: half widths of road and street, and the side street's stretch along z."""

    road: float
    walls: float
    crossing: tuple[float, float]
    end: float


def make_street(rng: np.random.Generator) -> Street:
    """A street 5 to 10 m wide between its kerbs; every other one has a side street in view."""
    road = rng.uniform(2.6, 5.2)
    start = rng.uniform(9, 40) if rng.random() < 0.5 else FAR_M
    return Street(road, road + rng.uniform(2.2, 5.5), (start, start + rng.uniform(6, 9)), rng.uniform(45, 110))


def make_camera(rng: np.random.Generator, street: Street, rows: int, columns: int) -> Camera:
    """On the road or on a pavement, at a car's or a standing person's height, never quite level."""
    reach = street.walls - 1.2
    x = rng.uniform(-reach, reach)
    yaw = rng.uniform(-0.28, 0.28) - 0.035 * x
    focal = columns * rng.uniform(0.78, 1.15)
    pitch = rng.uniform(-0.17, 0.19)
    return Camera(rows, columns, focal, x, rng.uniform(1.35, 3.0), yaw, pitch, rng.normal(0, 0.03))


def empty_street(
    canvas: Canvas, rng: np.random.Generator, light: Light, street: Street, x: Float, z: Float, rise: Float
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


def _markings(rng: np.random.Generator, street: Street, x: Float, z: Float) -> NDArray[np.bool_]:
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


def draw_houses(canvas: Canvas, rng: np.random.Generator, light: Light, street: Street) -> None:
    """What closes the street, then both rows of houses from the far end to the camera, with trees in the gaps."""
    typical = rng.uniform(5, 17)
    if rng.random() < 0.7:
        for side in (-1, 1):
            x, tall = side * rng.uniform(-2, 1), typical * rng.uniform(0.7, 1.6)
            building(canvas, rng, light, side, x, street.end, street.end + 12, tall)
    for side in (-1, 1):
        gaps = rng.uniform(0.02, 0.4)
        for z0, z1 in reversed(_plots(rng, street)):
            wall = side * (street.walls + (rng.uniform(0, 2) if rng.random() < 0.3 else 0.0))
            if rng.random() < gaps:
                for _ in range(int(rng.integers(0, 4))):
                    tree(canvas, rng, light, wall + side * rng.uniform(1, 5), rng.uniform(max(z0, 2.0), max(z1, 4.0)))
            elif z1 > 0.5:
                tall = float(np.clip(typical * rng.uniform(0.55, 1.5), 3.6, 26))
                building(canvas, rng, light, side, wall, z0, z1, tall)


def _plots(rng: np.random.Generator, street: Street) -> list[tuple[float, float]]:
    """Stretches along one side of the street, from behind the camera to the end, that leave the side street open."""
    plots, z = [], -8.0
    opening, close = street.crossing
    while z < street.end:
        stop = z + rng.uniform(6, 15)
        if z < close and stop > opening:
            if opening - z > 4:
                plots.append((z, opening - 0.5))
            z = close + 0.5
        else:
            plots.append((z, stop))
            z = stop
    return plots


@dataclass(frozen=True, order=True)
class Place:
    """Where a thing stands; `turn` is a car's heading, or the side of the street (-1, 1) a pole stands on."""

    z: float
    kind: str
    x: float
    turn: float = 0.0


def draw_things(canvas: Canvas, rng: np.random.Generator, light: Light, street: Street) -> None:
    """Trees, cars, people and poles, from far to near."""
    camera_x = float(canvas.camera.position[0])
    places = [*_kerbside(rng, street, camera_x), *_traffic(rng, street)]
    cars = [place for place in places if place.kind == "car"]
    places += [p for p in _people(rng, street) if not any(abs(p.z - c.z) < 2.6 and abs(p.x - c.x) < 1.3 for c in cars)]
    for place in sorted(places, reverse=True):
        if abs(place.x - camera_x) < 1.0 and place.z < 4:  # it would fill the picture
            continue
        if place.kind == "tree":
            tree(canvas, rng, light, place.x, place.z)
        elif place.kind == "car":
            car(canvas, rng, light, place.x, place.z, place.turn)
        elif place.kind == "person":
            person(canvas, rng, light, place.x, place.z)
        else:
            pole(canvas, rng, light, place.x, place.z, int(place.turn))


def _kerbside(rng: np.random.Generator, street: Street, camera_x: float) -> list[Place]:
    """Trees, parked cars and poles along both kerbs; the mouth of the side street stays free of trees and poles."""
    places: list[Place] = []
    kerb = street.road + 0.55
    opening, close = street.crossing
    for side in (-1.0, 1.0):
        standing = [Place(z, "pole", side * kerb, side) for z in _row(rng, 3.4, 18, 3, 9)]
        if rng.random() < 0.5:
            standing += [Place(z, "tree", side * (kerb + 0.5)) for z in _row(rng, 5, 50, 6, 12)]
        places += [place for place in standing if not opening - 1 < place.z < close + 1]
        if rng.random() < 0.65:
            heading = 0.0 if side > 0 or rng.random() < 0.5 else math.pi
            lane = side * (street.road - 1.1)
            first = 5.5 if abs(camera_x - lane) > 1.8 else 8.0
            row = _row(rng, first, 45, 5.6, 16)
            places += [Place(z, "car", lane, heading + rng.normal(0, 0.03)) for z in row]
    return places


def _traffic(rng: np.random.Generator, street: Street) -> list[Place]:
    """Cars on both lanes, driving on the right, and one that crosses."""
    places = []
    for _ in range(int(rng.integers(0, 3))):
        lane = float(rng.choice([-1.0, 1.0]))
        heading = (0.0 if lane > 0 else math.pi) + rng.normal(0, 0.05)
        places.append(Place(rng.uniform(7, 32), "car", lane * street.road * 0.4, heading))
    if street.crossing[0] < 30 and rng.random() < 0.6:
        heading = float(rng.choice([-1.0, 1.0])) * math.pi / 2 + rng.normal(0, 0.1)
        x = rng.uniform(-street.walls, street.walls)
        places.append(Place(sum(street.crossing) / 2, "car", x, heading))
    return places


def _people(rng: np.random.Generator, street: Street) -> list[Place]:
    """Three to seven people, most of them on a pavement, near enough to be seen."""
    places = []
    for _ in range(int(rng.integers(3, 8))):
        z = 3.6 + 5.4 * rng.random()
        if rng.random() < 0.75:
            x = float(rng.choice([-1.0, 1.0])) * rng.uniform(street.road + 0.4, street.walls - 0.3)
        else:
            x = rng.uniform(-street.road, street.road)
        places.append(Place(z, "person", x))
    return places


def _row(rng: np.random.Generator, first: float, last: float, low: float, high: float) -> list[float]:
    """Places along the street, `low` to `high` metres apart."""
    places, z = [], first + rng.uniform(0, high - low)
    while z < last:
        places.append(z)
        z += rng.uniform(low, high)
    return places
