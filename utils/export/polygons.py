"""Masks as polygons along the borders of pixels, for formats that know no holes."""
from collections.abc import Sequence

import numpy as np

# Pixels that every edge is moved inwards. Pillow (labelme) and OpenCV (Ultralytics) cut coordinates down to whole
# pixels and fill the border too: of an edge between two pixels they would fill the pixel outside as well. pycocotools,
# which rounds to fifths of a pixel, does not notice less than a tenth.
INSET = 0.05


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """One polygon for each 4-connected component of a mask; components that touch at a corner stay apart.

    A hole is joined to the border above it by a slit, a vertical line walked to and fro through pixels of the
    component: a polygon has no holes, crosses itself nowhere, and covers its component's pixels exactly.
    mask: (H, W) bool.
    Returns [(n, 2) float64], clockwise corners x, y in pixels, 0 to W and 0 to H, by their uppermost row.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    inside = np.pad(mask[top:rows[-1] + 1, left:columns[-1] + 1], 1)
    y, x, lower = _corners(inside)
    order, begins = _loops(_vertical_mates(y, x, lower))
    first = order[begins[:-1]]
    outer = inside[y[first] + 1, x[first] + 1]
    joints = _joints(inside, y, x, order, begins, np.flatnonzero(~outer))
    for hole in np.flatnonzero(~outer):  # walked the other way round, the component is on the right again
        order[begins[hole]:begins[hole + 1]] = order[begins[hole]:begins[hole + 1]][::-1]
    points = _moved_inwards(x[order] + left, y[order] + top, begins)
    found, rings = [], {}
    for loop in range(len(outer) - 1, -1, -1):  # a hole comes after the loop that it is joined to
        ring = points[begins[loop]:begins[loop + 1]]
        if loop in joints:
            ring = _with_holes(ring, outer[loop], [(edge, column + left + 0.5, rings.pop(hole))
                                                   for edge, column, hole in joints[loop]])
        if outer[loop]:
            found.append(ring)
        else:
            middle = np.array([[x[first[loop]] + left + 0.5, ring[-1, 1]]])
            rings[loop] = np.concatenate([middle, ring[-1:], ring[:-1], middle])
    return found[::-1]


def _corners(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners of the border, row by row: y, x, and whether it is the lower of two corners at one place.

    inside: (h + 2, w + 2) bool, with a margin.  Where two pixels touch diagonally lie two corners, one for each pixel:
    first the one whose horizontal edge goes to the left; the lower one's vertical edge goes down.
    """
    a, b, c, d = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    touching = (a == d) & (b == c) & (a != b)
    count = (a ^ b ^ c ^ d).astype(np.int8) + 2 * touching
    y, x = np.nonzero(count)
    twice = count[y, x] == 2
    y, x = np.repeat(y, 1 + twice), np.repeat(x, 1 + twice)
    second = np.zeros(len(y), bool)
    second[1:] = (y[1:] == y[:-1]) & (x[1:] == x[:-1])
    return y, x, np.where(a[y, x], second, ~second)


def _vertical_mates(y: np.ndarray, x: np.ndarray, lower: np.ndarray) -> list[int]:
    """For each corner the other end of its vertical edge.  In its row, the other end of corner i's edge is i ^ 1: along
    a line, corners begin and end edges in turn."""
    order = np.lexsort((lower, y, x))
    mates = np.empty(len(y), np.int64)
    mates[order[::2]], mates[order[1::2]] = order[1::2], order[::2]
    return mates.tolist()


def _loops(mates: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Closed loops of corners, one after the other, each from its first corner to the right; and where each begins, and
    the last ends."""
    seen, order, begins = bytearray(len(mates)), [], [0]
    for start in range(0, len(mates), 2):
        if not seen[start]:
            corner = start
            while True:
                other = corner ^ 1
                seen[corner] = seen[other] = 1
                order += (corner, other)
                corner = mates[other]
                if corner == start:
                    break
            begins.append(len(order))
    return np.array(order), np.array(begins)


def _joints(inside: np.ndarray, y: np.ndarray, x: np.ndarray, order: np.ndarray, begins: np.ndarray, holes: np.ndarray
            ) -> dict[int, list[tuple[int, int, int]]]:
    """Which loop each hole is joined to: {loop: [(which of its horizontal edges, column of the slit, hole)]}.

    A slit goes up from a hole's first corner to the next border; that lies on the hole's own component, and its loop
    begins further up.
    """
    if not len(holes):
        return {}
    first = order[begins[holes]]
    columns, which = np.unique(x[first], return_inverse=True)
    strip = inside[:, columns + 1]
    outside = np.maximum.accumulate(np.where(strip, 0, np.arange(len(strip), dtype=np.int32)[:, None]), axis=0)
    ends = outside[y[first], which]  # row y of the padded mask is the one above corner y
    width = inside.shape[1]
    edges = np.searchsorted(y * width + x, ends * width + x[first], side="right") - 1
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    loops = np.searchsorted(begins, place[edges], side="right") - 1
    joints = {}
    for loop, edge, column, hole in zip(loops.tolist(), ((place[edges] - begins[loops]) // 2).tolist(),
                                        x[first].tolist(), holes.tolist()):
        joints.setdefault(loop, []).append((edge, column, hole))
    return joints


def _moved_inwards(x: np.ndarray, y: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Points (n, 2) x, y of loops whose edges are moved to the right of who walks along them.

    x, y: of the loops' corners, one loop after the other, each beginning with a horizontal edge.  begins: of each loop.
    """
    following = np.arange(1, len(x) + 1)
    following[begins[1:] - 1] = begins[:-1]
    points = np.stack([x, y], axis=1).astype(float)
    points[:, 1] += INSET * np.repeat(np.sign(x[1::2] - x[::2]), 2)
    starts, ends = np.arange(1, len(x), 2), following[1::2]
    sideways = INSET * np.sign(y[ends] - y[starts])
    points[starts, 0] -= sideways
    points[ends, 0] -= sideways
    return points.round(2)


def _with_holes(ring: np.ndarray, outer: bool, holes: Sequence[tuple[int, float, np.ndarray]]) -> np.ndarray:
    """A loop's points with the rings of the holes that are joined to it.

    holes: (which horizontal edge, counted before holes were turned round; x of the slit; ring, which begins and ends at
    the slit).  Such edges are walked from left to right.
    """
    pieces, done = [], 0
    for edge, column, hole in sorted(((2 * edge if outer else len(ring) - 2 - 2 * edge, column, hole)
                                      for edge, column, hole in holes), key=lambda joint: joint[:2]):
        border = np.array([[column, ring[edge, 1]]])
        pieces += [ring[done:edge + 1], border, hole, border]
        done = edge + 1
    return np.concatenate([*pieces, ring[done:]])
