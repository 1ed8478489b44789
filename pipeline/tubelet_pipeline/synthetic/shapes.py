"""Shapes as signed distances: negative inside, in units of the shape's radius.

A point is given in the shape's own frame (x right, y down, the circumscribed circle has radius 1 or a little more), so
moving, turning and scaling a shape is a change of coordinates, and an anti-aliased edge is one clip of the distance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

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
    # Folding into half a point of the star leaves one straight edge: from the tip to the notch.
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
"""Shapes whose outline shows that they turn. (A hexagon's does too, but hardly at 64 pixels.)"""
