"""What the demo's scenes are painted with: colors, shapes, surface textures, backgrounds.

A point of a shape is given in the shape's own frame (x right, y down, unit: the shape's radius), so moving, turning and
scaling a shape is a change of coordinates, and an anti-aliased edge is one clip of the signed distance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

OBJECT_COLORS: dict[str, Color] = {
    "red": (226, 48, 60),
    "orange": (247, 136, 18),
    "yellow": (255, 212, 64),
    "green": (52, 178, 92),
    "teal": (28, 188, 190),
    "blue": (52, 104, 240),
    "purple": (148, 74, 222),
    "pink": (255, 122, 190),
    "white": (244, 244, 240),
}
"""By the adjective a caption uses."""

BACKGROUND_COLORS: tuple[Color, ...] = (
    (54, 60, 76),
    (24, 28, 44),
    (78, 92, 74),
    (94, 74, 98),
    (116, 88, 76),
    (150, 160, 152),
    (204, 190, 164),
    (196, 204, 214),
)

MIN_CONTRAST = 105.0
"""Smallest RGB distance between an object and its background. The weakest remaining pair (teal on gray green) is
clearly visible at 64 pixels."""


def backgrounds_for(colors: list[Color]) -> NDArray[np.int64]:
    """Indices of the background colors with enough contrast to all of `colors`. Never empty."""
    objects = np.array(colors, np.float64)
    distance = np.linalg.norm(np.array(BACKGROUND_COLORS)[:, None] - objects, axis=2).min(axis=1)
    fit = np.flatnonzero(distance >= MIN_CONTRAST)
    return fit if fit.size else np.array([int(distance.argmax())])


Plane = NDArray[np.float32]
"""One value per pixel, [rows, columns]."""

REACH = 1.2
"""No shape extends further than this from its center, in radii."""


def _polygon(corners: int, inradius: float) -> Callable[[Plane, Plane], Plane]:
    angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    normals = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def distance(x: Plane, y: Plane) -> Plane:
        result = normals[0, 0] * x + normals[0, 1] * y
        for a, b in normals[1:]:
            result = np.maximum(result, a * x + b * y)
        return result - np.float32(inradius)

    return distance


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 1


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.32)


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    long, short = np.float32(1.0), np.float32(0.36)
    return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))


def _star(x: Plane, y: Plane) -> Plane:
    sector = np.float32(2 * np.pi / 5)
    # Folding by symmetry into half a point of the star leaves one straight edge, from tip to notch.
    bearing = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    tip = np.array([1.15, 0.0])
    notch = 0.52 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = (notch - tip) / np.hypot(*(notch - tip))
    normal_x, normal_y = np.float32(edge[1]), np.float32(-edge[0])
    return (radius * np.cos(bearing) - np.float32(tip[0])) * normal_x + radius * np.sin(bearing) * normal_y


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(_circle(x, y), np.float32(0.78) - np.hypot(x - np.float32(0.5), y))


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _polygon(4, 0.8),
    "triangle": _polygon(3, 0.58),
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "hexagon": _polygon(6, 0.9),
    "crescent": _crescent,
}
"""Signed distance of each shape, by its English name."""

TURNABLE = ("square", "triangle", "star", "cross", "crescent")
"""Shapes whose outline shows a rotation (a hexagon's is hard to see at 64 pixels)."""


PERIOD = 0.62
"""Length of one repeat, in radii: about 11 pixels on a 128-pixel frame, so still two to three patches wide at 64."""

_WAVE = np.float32(2 * np.pi / PERIOD)
_SHARPNESS = np.float32(3.0)


def _plain_texture(x: Plane, y: Plane) -> Plane:
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)


def _striped_texture(x: Plane, y: Plane) -> Plane:
    del y
    return _edge(np.sin(_WAVE * x))


def _checkered(x: Plane, y: Plane) -> Plane:
    half = _WAVE / 2
    return _edge(2 * np.sin(half * x) * np.sin(half * y))


def _dotted(x: Plane, y: Plane) -> Plane:
    half = _WAVE / 2
    return _edge(2 * (np.cos(half * x) ** 2 * np.cos(half * y) ** 2 - np.float32(0.42)))


def _edge(wave: Plane) -> Plane:
    return np.clip(_SHARPNESS * wave + np.float32(0.5), 0, 1)


TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": _plain_texture,
    "striped": _striped_texture,
    "checkered": _checkered,
    "dotted": _dotted,
}
"""Share of the second tone at each point, in [0, 1], by the adjective a caption uses."""


Pattern = Callable[[np.random.Generator, int, int], NDArray[np.float64]]
"""(rng, height, width) -> brightness offsets [height, width], in [-1, 1]."""

CONTRAST = 0.17
"""Brightness swing of a pattern, as a share of the base color."""


def _plain_background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    del rng
    return np.zeros((height, width))


def _gradient(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    along = _ramp(rng.uniform(0, 2 * np.pi), height, width)
    return 1.6 * along / np.abs(along).max()


def _striped_background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    along = _ramp(rng.uniform(0, np.pi), height, width)
    return 0.6 * np.clip(4 * np.sin(2 * np.pi * rng.uniform(4, 8) * along + rng.uniform(0, 2 * np.pi)), -1, 1)


def _cloudy(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    total = np.zeros((height, width))
    for cells, weight in ((4, 0.6), (9, 0.4), (20, 0.3)):
        grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
        total += weight * _enlarge(_enlarge(grid, height).T, width).T
    return 1.3 * total


def _ramp(bearing: float, height: int, width: int) -> NDArray[np.float64]:
    """Position along `bearing`, in units of the smaller side, zero at the center."""
    y, x = np.mgrid[:height, :width]
    short = min(height, width)
    return ((x - width / 2) * np.cos(bearing) + (y - height / 2) * np.sin(bearing)) / short


def _enlarge(grid: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Stretch the rows of `grid` to `size` rows, smoothly."""
    at = np.linspace(0, len(grid) - 1, size)
    low = np.minimum(at.astype(np.int64), len(grid) - 2)
    share = at - low
    share = (share * share * (3 - 2 * share))[:, None]
    return grid[low] * (1 - share) + grid[low + 1] * share


BACKGROUND_PATTERNS: dict[str, Pattern] = {
    "plain": _plain_background,
    "gradient": _gradient,
    "striped": _striped_background,
    "cloudy": _cloudy,
}


def paint(rng: np.random.Generator, pattern: str, color: Color, height: int, width: int) -> NDArray[np.float32]:
    """Background image, float32 [height, width, 3] in 0..255."""
    swing = 1 + CONTRAST * BACKGROUND_PATTERNS[pattern](rng, height, width)
    return np.clip(swing[:, :, None] * np.array(color), 0, 255).astype(np.float32)
