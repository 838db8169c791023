"""Colours, and how a scene is lit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sceneray.data.townscape.canvas import Color, mix, scale

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
    (84, 100, 84), (132, 128, 84), (62, 74, 50), (122, 70, 62), (96, 92, 78), (120, 112, 90), (78, 104, 88),
    (142, 126, 102),
)  # fmt: skip
NEEDLES: tuple[Color, ...] = ((58, 80, 60), (70, 88, 56), (74, 92, 88), (84, 86, 66))
BODIES: tuple[Color, ...] = (
    (206, 206, 206), (168, 170, 174), (116, 118, 122), (58, 60, 64), (150, 44, 40), (52, 78, 128), (76, 98, 70),
    (132, 110, 84), (176, 160, 124), (92, 112, 128), (104, 44, 46), (120, 132, 108), (196, 150, 60),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (60, 62, 70), (120, 118, 116), (176, 172, 164), (154, 52, 46), (56, 78, 128), (82, 106, 68), (134, 104, 76),
    (96, 116, 136), (176, 142, 76), (42, 44, 50), (200, 196, 192), (116, 68, 92), (146, 122, 98),
)  # fmt: skip
MASTS: tuple[Color, ...] = (
    (96, 98, 100), (60, 64, 66), (134, 134, 132), (74, 88, 74), (112, 92, 76), (160, 156, 148), (84, 92, 108),
)  # fmt: skip
SKIN: tuple[Color, ...] = ((214, 170, 140), (184, 136, 106), (136, 96, 72), (96, 68, 54))


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


def make_light(rng: np.random.Generator) -> Light:
    """Day with sun and cast shadows, an overcast sky, or dusk with lit windows."""
    kind = rng.choice(["day", "overcast", "dusk"], p=[0.45, 0.33, 0.22])
    sun_side = float(rng.choice([-1.0, 1.0]))
    gain = rng.uniform(0.85, 1.12)
    if kind == "day":
        lit, dim = 1.12, rng.uniform(0.62, 0.8)
        left, right = (lit, dim) if sun_side > 0 else (dim, lit)
        cast = (-sun_side * rng.uniform(0.4, 1.4), rng.uniform(-0.5, 0.7))
        zenith = mix((56, 98, 152), (112, 138, 164), rng.random())
        horizon = mix((146, 172, 192), (202, 200, 190), rng.random())
        return Light(
            scale((1.04, 1.0, 0.94), gain), left, right, rng.uniform(0.75, 1.05), rng.uniform(0.5, 0.68), cast,
            zenith, horizon, (240, 240, 238), rng.uniform(0.0, 0.75), rng.uniform(0.001, 0.006), False,
        )  # fmt: skip
    if kind == "overcast":
        grey = rng.uniform(100, 196)
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
