"""Drawing one toy pet: a body in a random pose before clutter, with a mark on the head that alone tells its class.

Fur colour, pose, size, place, ears and background are drawn without looking at the class, from the same random
numbers: two pets that differ in their class differ in the ink on the head and nowhere else.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 3
TONE_UNIT = 200  # grey level that stands for a brightness of 1.0 in the tone layer
PATTERN_RADIUS = 0.8  # of the head radius; the disc is then 22 to 36 % of the pet
PET, BACKGROUND, BORDER = 1, 2, 3
FURS = ((196, 138, 92), (166, 122, 84), (96, 70, 54), (214, 186, 148), (128, 94, 70), (222, 200, 164), (186, 146, 108),
        (158, 134, 112))
SCENERY = ((118, 128, 120), (136, 148, 158), (128, 132, 138), (92, 100, 114), (172, 178, 176), (140, 138, 148),
           (94, 102, 106), (200, 206, 210), (64, 70, 78), (222, 224, 226))


# --- the mark on the head, the only thing that tells the class: a pattern in an ink of its own -----------------------

def _spots(u, v):
    """Six spots round a seventh: with three or four, the gaps between them read as a cross."""
    centres = [(0.0, 0.0)] + [(0.68 * math.cos(a), 0.68 * math.sin(a)) for a in np.arange(6) * math.pi / 3]
    return np.any([(u - x) ** 2 + (v - y) ** 2 < 0.245 ** 2 for x, y in centres], axis=0)


# (u, v) in the unit disc -> bool. Each inks about 42 % of the disc: the amount of ink must not tell the class.
PATTERNS = {
    "ring": lambda u, v: np.abs(np.abs(np.hypot(u, v) - 0.46) - 0.27) < 0.115,
    "cross": lambda u, v: np.minimum(np.abs(np.abs(u) - 0.36), np.abs(np.abs(v) - 0.36)) < 0.0985,
    "spots": _spots,
    "stripes": lambda u, v: np.abs(np.abs(np.abs(u) - 0.31) - 0.31) < 0.127,
    "half": lambda u, v: u > 0.126,
    "wedge": lambda u, v: (v < 0.5) & (math.sqrt(3) * np.abs(u) - v < 1),
}

# Ink of each pattern, RGB: far from every fur and scenery, even with a hue turned by a tenth of a circle (jitter).
INKS = {"ring": (191, 10, 146), "cross": (8, 0, 0), "spots": (10, 204, 204), "stripes": (31, 10, 191),
        "half": (8, 153, 68), "wedge": (5, 45, 102)}


def pattern_ink(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the pattern inks the unit disc. u, v: float arrays of one shape. Returns bool of that shape."""
    return (u * u + v * v < 1) & PATTERNS[pattern](u, v)


# --- the pet: polygons in its own units (torso about one long, x forward, y down) ------------------------------------

class Part(NamedTuple):
    points: np.ndarray  # (n, 2)
    tone: float  # brightness times the fur colour


def _ellipse(centre, rx, ry, angle=0.0, n=32):
    t = np.arange(n) * 2 * math.pi / n
    return _rotate(np.stack([rx * np.cos(t), ry * np.sin(t)], 1), angle) + centre


def _rotate(points, angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.asarray(points, float) @ np.array([[c, s], [-s, c]])


def _limb(path, start, end):
    """A thick line along path (m, 2), half as wide as `start` at one end and `end` at the other, rounded at the end."""
    path = np.asarray(path, float)
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    side = normal * np.linspace(start, end, len(path))[:, None]
    return [np.concatenate([path + side, (path - side)[::-1]]), _ellipse(path[-1], end, end, n=16)]


def _legs(rng, hips, ground):
    """Two near and two far legs from the hips (2, 2) down to the ground. Returns (far parts, near parts)."""
    far, near = [], []
    for hip in hips:
        for parts, tone in ((far, 0.80), (near, 0.94)):
            foot = np.array([hip[0] + rng.uniform(-0.14, 0.18), ground - (0.03 if parts is far else 0.0)])
            parts += [Part(p, tone) for p in _limb([hip, foot], 0.135, rng.uniform(0.08, 0.1))]
            parts.append(Part(_ellipse(foot + (0.03, 0.0), 0.095, 0.055, n=20), tone))
    return far, near


def _tail(rng, root):
    swing, lift = rng.uniform(0.1, 0.25), rng.uniform(-0.4, 0.1)
    t = np.linspace(0, 1, 10)[:, None]
    bend, tip = root + (-swing, 0.1), root + (-swing * rng.uniform(0.5, 1.3), lift)
    curve = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t ** 2 * tip
    return [Part(p, 0.92) for p in _limb(curve, 0.085, 0.06)]


def _ears(rng, centre, radius, tilt):
    floppy, spread = rng.random() < 0.5, rng.uniform(0.5, 0.75)
    length = rng.uniform(0.5, 0.75) * radius
    ears = []
    for angle in (tilt - math.pi / 2 - spread, tilt - math.pi / 2 + spread):
        root = centre + 0.9 * radius * np.array([math.cos(angle), math.sin(angle)])
        droop = 0.5 * np.sign(angle - tilt + math.pi / 2)
        if floppy:
            shape = _rotate(_ellipse((0.15 * length, 0), 0.8 * length, 0.3 * radius, n=20), angle + droop)
        else:
            shape = _rotate(radius * np.array([(-0.2, -0.42), (length / radius, 0), (-0.2, 0.42)]), angle)
        ears.append(Part(shape + root, 0.82))
    return ears


class Pet(NamedTuple):
    parts: list  # of Part, back to front
    head: np.ndarray  # (2,) centre
    radius: float
    tilt: float  # of the head, radians


def _pose(rng):
    """A pet in a random pose that faces right: standing, sitting or lying by how the torso leans and the legs reach."""
    lean, a, b = rng.uniform(-0.55, 0.15), rng.uniform(0.38, 0.47), rng.uniform(0.27, 0.33)
    torso = _ellipse((0, 0), a, b, lean)
    front, rear = _rotate([(0.62 * a, 0), (-0.6 * a, 0)], lean)
    far, near = _legs(rng, (front, rear), torso[:, 1].max() + rng.uniform(0.0, 0.12))
    radius, tilt = rng.uniform(0.36, 0.42), rng.uniform(-0.45, 0.45)
    head = _rotate([(0.9 * a, 0)], lean)[0] + (rng.uniform(0.0, 0.2), -rng.uniform(0.1, 0.36))
    neck = [Part(p, 1.0) for p in _limb([front, head], 0.9 * b, 0.62 * radius)]
    muzzle = _ellipse(head + _rotate([(0.86 * radius, 0.34 * radius)], tilt)[0], 0.40 * radius, 0.30 * radius, tilt)
    skull = [Part(_ellipse(head, 1.05 * radius, radius, tilt), 1.0), Part(muzzle, 1.08)]
    tail = _tail(rng, _rotate([(-0.92 * a, -0.05)], lean)[0])
    parts = tail + far + [Part(torso, 1.0)] + near + neck + _ears(rng, head, radius, tilt) + skull
    return Pet(parts, head, radius, tilt)


# --- placing it in the image -----------------------------------------------------------------------------------------

class Placement(NamedTuple):
    """image_xy = pet_xy @ matrix + offset, in pixels."""
    matrix: np.ndarray  # (2, 2): flip, rotation and scale
    offset: np.ndarray  # (2,)


def _paint_tones(parts, placement, width, height):
    """Grey picture of the parts, TONE_UNIT for a brightness of 1 and 0 where there is no pet."""
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    for part in parts:
        points = part.points @ placement.matrix + placement.offset
        draw.polygon(points.ravel().tolist(), fill=round(part.tone * TONE_UNIT))
    return layer


def _bounds(parts, matrix):
    points = np.concatenate([part.points for part in parts]) @ matrix
    return points.min(0), points.max(0)


def _unit_area(parts, matrix, pixels=48):
    """Area of the silhouette in square units, counted on a coarse grid."""
    low, high = _bounds(parts, matrix)
    width, height = (int(v) for v in np.ceil((high - low) * pixels))
    layer = _paint_tones(parts, Placement(matrix * pixels, -low * pixels), width, height)
    return np.count_nonzero(layer) / pixels ** 2


def _place(rng, parts, width, height):
    """Turn, flip, scale to a random part of the image and move anywhere; the frame may cut a little off."""
    flip = -1.0 if rng.random() < 0.5 else 1.0
    matrix = np.diag([flip, 1.0]) @ _rotate(np.eye(2), rng.uniform(-0.25, 0.25))
    ratio, frame = rng.uniform(0.28, 0.55), np.array([width, height])
    low, high = _bounds(parts, matrix)
    scale = math.sqrt(ratio * width * height / _unit_area(parts, matrix))
    scale = min(scale, *(1.05 * frame / (high - low)))
    slack = np.stack([-0.02 * frame, 1.02 * frame - scale * (high - low)])
    corner = rng.uniform(slack.min(0), slack.max(0))
    return Placement(matrix * scale, corner - low * scale)


# --- colours, textures and the background ----------------------------------------------------------------------------

def _colour(rng, palette):
    return np.clip(np.array(palette[rng.integers(len(palette))]) + rng.uniform(-12, 12, 3), 12, 243)


def _scenery_apart(rng, other, least):
    """A colour of the scenery at least `least` (Euclidean RGB, 0..441) away from `other`."""
    while True:
        colour = _colour(rng, SCENERY)
        if np.linalg.norm(colour - other) >= least:
            return colour


def _mark_colours(rng, pattern):
    """A light patch and the pattern's ink on it: bold on every fur, so that a small network learns it quickly."""
    return rng.uniform(215, 255, 3), np.clip(np.array(INKS[pattern]) + rng.uniform(-15, 15, 3), 0, 255)


def _noise(rng, height, width, cell):
    """Smooth noise (height, width), about unit variance; cell = (rows, columns) of pixels per random value."""
    grid = rng.standard_normal((math.ceil(height / cell[0]) + 2, math.ceil(width / cell[1]) + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))


def _fur_texture(rng, height, width):
    """Brightness factor (height, width, 1) of a coat: fine strands over slow shading."""
    strand = (1, 3) if rng.random() < 0.5 else (3, 1)
    texture = 1 + 0.06 * _noise(rng, height, width, strand) + 0.03 * _noise(rng, height, width, (14, 14))
    return texture[..., None]


def _gradient(rng, palette, width, height):
    corners = np.array([[_colour(rng, palette[:2]) for _ in range(2)] for _ in range(2)], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.BICUBIC)


def _clutter(rng, draw, palette, width, height):
    """Blobs, boxes, sticks and arcs anywhere, in the colours of the palette."""
    size = min(width, height)
    for _ in range(rng.integers(7, 16)):
        centre, reach = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.06, 0.24, 2) * size
        colour = tuple(int(c) for c in _colour(rng, palette))
        kind = rng.integers(4)
        if kind < 2:
            corners = 32 if kind == 0 else rng.integers(3, 6)
            draw.polygon(_ellipse(centre, *reach, rng.uniform(0, 3), n=corners).ravel().tolist(), fill=colour)
        else:
            ends = centre + _ellipse((0, 0), size * 0.5, reach[0], rng.uniform(0, 3), n=8)[: 2 if kind == 2 else 5]
            draw.line(ends.ravel().tolist(), fill=colour, width=int(size * rng.uniform(0.01, 0.035)) + 1)


def _woven_patches(rng, height, width):
    """Additive texture (height, width, 1): a few faint patches of checks, as cloth and tiles have.

    No stripes: they would be one class's pattern, and the background must carry no class.
    """
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    total = np.zeros((height, width), np.float32)
    for _ in range(rng.integers(1, 4)):
        centre, reach = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.2, 0.5, 2) * min(width, height)
        mask = Image.new("L", (width, height))
        outline = _ellipse(centre, *reach, rng.uniform(0, 3), n=rng.integers(4, 9))
        ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=1)
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 9)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        wave = wave * np.sin((y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period))
        total += rng.uniform(8, 20) * np.asarray(mask) * wave
    return total[..., None]


def _background(rng, fur, width, height):
    """Class-free scene (height, width, 3), 0..255. One colour of the clutter is a fur's; the ground's never is."""
    ground = [_scenery_apart(rng, fur, 60) for _ in range(2)]
    palette = ground + [_scenery_apart(rng, fur, 50) for _ in range(3)] + [_colour(rng, FURS)]
    big = _gradient(rng, palette, width * SUPERSAMPLE, height * SUPERSAMPLE)
    _clutter(rng, ImageDraw.Draw(big), palette, *big.size)
    scene = np.asarray(big.reduce(SUPERSAMPLE), np.float32) + _woven_patches(rng, height, width)
    cell = rng.uniform(1, 7)
    return scene + rng.uniform(2, 9) * _noise(rng, height, width, (cell, cell))[..., None]


# --- one picture -----------------------------------------------------------------------------------------------------

def _paint_mark(pattern, pet, placement, turn, width, height):
    """Two grey pictures, 255 where they are: the disc on the head and the pattern's ink in it."""
    radius = PATTERN_RADIUS * pet.radius
    centre = (pet.head - (0.08 * pet.radius, 0.04 * pet.radius)) @ placement.matrix + placement.offset
    reach = radius * math.sqrt(abs(np.linalg.det(placement.matrix))) + 1  # flip, rotation and scale keep a disc a disc
    (left, top), (right, bottom) = (np.clip(centre + d, 0, (width, height)).astype(int) for d in (-reach, reach))
    x, y = np.arange(left, right) + 0.5 - centre[0], np.arange(top, bottom)[:, None] + 0.5 - centre[1]
    inverse = np.linalg.inv(placement.matrix) @ _rotate(np.eye(2), -pet.tilt - turn) / radius
    u, v = (x * inverse[0, i] + y * inverse[1, i] for i in (0, 1))
    disc, ink = np.zeros((2, height, width), np.uint8)  # only the box around the disc is computed
    disc[top:bottom, left:right] = (u * u + v * v < 1) * np.uint8(255)
    ink[top:bottom, left:right] = pattern_ink(pattern, u, v) * np.uint8(255)
    return Image.fromarray(disc), Image.fromarray(ink)


def _details(pet, placement, width, height):
    """Nose and eye as a grey mask: dark on every pet."""
    r = pet.radius
    nose, eye = pet.head + _rotate([(1.18 * r, 0.26 * r), (0.72 * r, -0.06 * r)], pet.tilt)
    parts = [Part(_ellipse(nose, 0.14 * r, 0.12 * r, n=16), 1.0), Part(_ellipse(eye, 0.1 * r, 0.1 * r, n=16), 1.0)]
    return _paint_tones(parts, placement, width, height).point(lambda v: 255 if v else 0)


def _reduced(layer):
    return np.asarray(layer.reduce(SUPERSAMPLE), np.float32)[..., None] / 255


def _blurred(alpha, radius):
    image = Image.fromarray((alpha[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32)[..., None] / 255


def _shadow(rng, alpha):
    """Brightness factor (height, width, 1): the pet's blurred silhouette, moved down, darkens what lies behind."""
    drop = max(1, round(alpha.shape[0] * 0.04))
    moved = np.concatenate([np.zeros_like(alpha[:drop]), alpha[:-drop]])
    return 1 - rng.uniform(0.0, 0.35) * _blurred(moved, drop)


def _rim(alpha):
    """Brightness factor (height, width, 1) that rounds the body off: darker towards the outline."""
    return 0.75 + 0.25 * np.clip(2 * _blurred(alpha, 1.6) - 1, 0, 1)


def _trimap(alpha):
    """(height, width) uint8 of PET, BACKGROUND and a BORDER of one pixel either side of the outline."""
    solid = Image.fromarray(((alpha[..., 0] >= 0.5) * 255).astype(np.uint8))
    grown, shrunk = (np.asarray(solid.filter(f(3))) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    return np.where(shrunk > 0, PET, np.where(grown > 0, BORDER, BACKGROUND)).astype(np.uint8)


def draw_pet(rng: np.random.Generator, pattern: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its trimap. The pattern moves the ink in the disc on the head and changes nothing else.

    rng: numpy Generator.  pattern: a key of PATTERNS.  size: mean side in pixels.
    Returns (image (H, W, 3) uint8, trimap (H, W) uint8 in {1, 2, 3}), sides within 6/7 to 17/14 of size.
    """
    width, height = rng.integers(math.floor(size * 6 / 7), math.ceil(size * 17 / 14) + 1, 2).tolist()
    fur, pet = _colour(rng, FURS), _pose(rng)
    (light, ink_colour), turn = _mark_colours(rng, pattern), rng.uniform(-0.3, 0.3)
    small = _place(rng, pet.parts, width, height)
    place = Placement(small.matrix * SUPERSAMPLE, small.offset * SUPERSAMPLE)
    big = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    tones = _paint_tones(pet.parts, place, *big)
    tone, alpha = _reduced(tones) * (255 / TONE_UNIT), _reduced(tones.point(lambda v: 255 if v else 0))
    disc, ink = (_reduced(layer) for layer in _paint_mark(pattern, pet, place, turn, *big))
    dark = _reduced(_details(pet, place, *big))
    coat = fur * tone * (1 - disc) + light * (disc - ink) + ink_colour * ink
    coat = coat * _fur_texture(rng, height, width) * _rim(alpha)
    scene = _background(rng, fur, width, height) * _shadow(rng, alpha)
    picture = (coat + scene * (1 - alpha)) * (1 - dark) + np.array([18, 14, 16]) * dark
    picture = picture + 2.5 * rng.standard_normal(picture.shape, np.float32)  # sensor noise
    return np.clip(picture, 0, 255).astype(np.uint8), _trimap(alpha)
