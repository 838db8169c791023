"""Class-id masks as codes: COCO's run lengths, and polygons that lie on the pixels' edges. Both lose nothing.

A mask is uint8 [H, W] of class ids. Both codes are made class by class, for the ids that a caller names.

**Run lengths** are COCO's compressed ones, by COCO's own library: `{"size": [H, W], "counts": "..."}`.

**Polygons** follow the edges of pixels, not their centres: corners are whole numbers, x from 0 to W to the right, y
from 0 to H downwards, and the pixel in column x and row y is the square from (x, y) to (x+1, y+1). A polygon is one
region of a class connected by edges; its area is its number of pixels, and filling it gives the region back. The
structure is that of GeoJSON's MultiPolygon (RFC 7946, 3.1.7): a list of polygons, each a list of rings, the outline
first and then the holes; a ring ends with its first corner; by the shoelace formula an outline's area is positive, a
hole's negative. No ring touches itself, so that the polygons are valid for geometry libraries (OGC simple features).

OpenCV's contours would be the alternative: they run through pixel centres, so that a pixel has no area and a hole is
traced on the pixels around it, and the library is 150 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sceneray.masks import Mask, checked

Ints = NDArray[np.int64]
Ring = list[list[int]]  # corners [x, y]; the last is the first
MultiPolygon = list[list[Ring]]

# Directions of travel along a pixel's edges, with the pixel on the right hand: its top, right, bottom and left edge.
EAST, SOUTH, WEST, NORTH = range(4)
# (row, column) of the neighbour ahead, of the one beyond the edge, and of the edge's first corner, by direction.
AHEAD = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
BEYOND = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
CORNER = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])


def run_lengths(mask: Mask, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """COCO's compressed run lengths of each of `ids`: `size` [H, W] and `counts`, as `pycocotools.mask.decode` wants.

    COCO's runs go down the columns, and the first run counts pixels outside of the class.
    """
    from pycocotools import mask as coco

    columns = np.asfortranarray(checked(mask))
    codes = {}
    for id_ in ids:
        code = coco.encode((columns == id_).view(np.uint8))
        codes[id_] = {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
    return codes


def polygons(mask: Mask, ids: Sequence[int]) -> dict[int, MultiPolygon]:
    """The regions of each of `ids` as polygons with their holes, in the convention that this module states."""
    found: dict[int, MultiPolygon] = {id_: [] for id_ in ids}
    edges = _Edges(checked(mask), ids)
    if not edges.count:
        return found
    following, rings = _simple_rings(edges)
    order = np.lexsort((_steps_left(following, rings) * -1, rings))
    leaders, starts = np.unique(rings[order], return_index=True)  # a ring's leader is its first edge, and names it
    outlines = _outlines(edges, rings, leaders)
    turns = order[_turns(edges.direction[order], starts)]
    corners = edges.corners(turns).tolist()
    firsts = np.searchsorted(rings[turns], leaders)  # where each ring begins among the corners
    ends = np.append(firsts[1:], len(turns))
    # Outlines stand before their holes: a hole's first edge lies further down.
    for place in np.lexsort((leaders, leaders[outlines])):
        ring = [*corners[firsts[place] : ends[place]], corners[firsts[place]]]
        region = found[int(edges.value[leaders[place]])]
        if outlines[place] == place:
            region.append([ring])
        else:
            region[-1].append(ring)
    return found


def count_borders(mask: Mask) -> int:
    """Pairs of neighbouring pixels of different classes: what the time and size of `polygons` grow with."""
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    return int(np.count_nonzero(across) + np.count_nonzero(down))


class _Edges:
    """The unit edges between pixels of a class and what is not of it, each once for every class that it borders.

    Sorted by direction, then by pixel; `pixel` numbers the pixels of the mask with a border of one around it, row by
    row. `value` is the class.
    """

    def __init__(self, mask: Mask, ids: Sequence[int]) -> None:
        wanted = np.full(256, -1, np.int16)
        wanted[list(ids)] = list(ids)
        framed = np.pad(wanted[mask], 1, constant_values=-1)
        self.width = width = framed.shape[1]
        self._flat = flat = framed.ravel()
        inner = flat[width:-width]  # flat, so that one scan finds the edges; the frame's own pixels are of no class
        pixels = []
        for step in BEYOND @ np.array([width, 1]):
            beyond = flat[width + step : len(flat) - width + step]
            pixels.append(np.flatnonzero((inner != beyond) & (inner >= 0)) + width)
        self.pixel: Ints = np.concatenate(pixels)
        self.direction: Ints = np.repeat(np.arange(4), [len(part) for part in pixels])
        self.value = self._flat[self.pixel]
        self.count = len(self.pixel)
        self._key = self._keys(self.direction, self.pixel)

    def at(self, direction: Ints, pixel: Ints) -> Ints:
        """The places of the edges in these directions of these pixels; they must be there."""
        return np.searchsorted(self._key, self._keys(direction, pixel))

    def neighbour(self, *steps: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """The pixels that lie these steps (row, column) from each edge's own, and whether they are of its class."""
        pixel = self.pixel + sum(step[self.direction] @ np.array([self.width, 1]) for step in steps)
        return pixel, self._flat[pixel] == self.value

    def corners(self, places: Ints) -> Ints:
        """int [N, 2]: x and y of the first corners of these edges."""
        rows, columns = np.divmod(self.pixel[places], self.width)
        down, right = CORNER[self.direction[places]].T
        return np.stack([columns - 1 + right, rows - 1 + down], axis=1)

    def _keys(self, direction: Ints, pixel: Ints) -> Ints:
        return direction * len(self._flat) + pixel


def _simple_rings(edges: _Edges) -> tuple[Ints, Ints]:
    """For each edge the one that follows it, and the ring it lies on, named by its first edge.

    Where two pixels of a region touch by their corners alone, a ring stays with its pixel, so that regions are those
    connected by edges. Where one ring would pass such a corner twice, it changes the pixel instead, which parts it
    into two rings that touch there: an outline and a hole, or two holes.
    """
    ahead, same_ahead = edges.neighbour(AHEAD)
    aside, same_aside = edges.neighbour(AHEAD, BEYOND)
    right_turn = edges.at((edges.direction + 1) % 4, edges.pixel)[~same_ahead]
    straight = edges.at(edges.direction, ahead)[same_ahead & ~same_aside]
    left_turn = edges.at((edges.direction + 3) % 4, aside)[same_ahead & same_aside]
    following = np.empty(edges.count, np.int64)
    following[~same_ahead] = right_turn
    following[same_ahead & ~same_aside] = straight
    following[same_ahead & same_aside] = left_turn
    rings = _leaders(following)
    touching = np.flatnonzero(~same_ahead & same_aside)
    opposite = edges.at((edges.direction[touching] + 2) % 4, aside[touching])  # arrives at the same corner
    twice = rings[touching] == rings[opposite]
    if twice.any():
        following[touching[twice]] = following[opposite[twice]]
        rings = _leaders(following)
    return following, rings


def _leaders(following: Ints) -> Ints:
    """For each edge the least edge of its ring, found by doubling the stride: log2 of the longest ring rounds."""
    leader = np.arange(len(following))
    stride = following
    while True:
        least = np.minimum(leader, leader[stride])
        if np.array_equal(least, leader):
            return leader
        leader, stride = least, stride[stride]


def _steps_left(following: Ints, rings: Ints) -> Ints:
    """How many edges come after each until its ring is back at its leader, found by doubling too."""
    last = following == rings
    stride = np.where(last, np.arange(len(following)), following)
    steps = np.where(last, 0, 1)
    while True:
        further = steps[stride]
        if not further.any():
            return steps
        steps, stride = steps + further, stride[stride]


def _turns(direction: Ints, starts: Ints) -> NDArray[np.bool_]:
    """Whether each edge leaves in another direction than the one before it; edges in order, rings from `starts`."""
    before = np.roll(direction, 1)
    before[starts] = direction[np.append(starts[1:], len(direction)) - 1]
    turns: NDArray[np.bool_] = direction != before
    return turns


def _outlines(edges: _Edges, rings: Ints, leaders: Ints) -> Ints:
    """For each ring (a place in `leaders`) the outline of its region; for an outline itself.

    Above a hole's topmost edge lies a pixel of the region. The left end of that pixel's run lies on the outline, or on
    another hole of the region that begins further up: going on from there ends at the outline.
    """
    ring = np.searchsorted(leaders, rings)
    x = edges.corners(np.arange(edges.count))[:, 0]
    dy = np.array([0, 1, 0, -1])[edges.direction]
    area = np.bincount(ring, weights=x * dy, minlength=len(leaders))  # Green: the integral of x dy
    holes = np.flatnonzero(area < 0)
    west = np.flatnonzero(edges.direction == WEST)  # the bottom edges of pixels, by row
    _, first = np.unique(ring[west], return_index=True)
    topmost = np.zeros(len(leaders), np.int64)
    topmost[ring[west[first]]] = west[first]
    north = np.flatnonzero(edges.direction == NORTH)  # the left edges of pixels, by row and column
    run = np.searchsorted(edges.pixel[north], edges.pixel[topmost[holes]], side="right") - 1
    outline = np.arange(len(leaders))
    outline[holes] = ring[north[run]]
    while not np.array_equal(outline, further := outline[outline]):
        outline = further
    return outline
