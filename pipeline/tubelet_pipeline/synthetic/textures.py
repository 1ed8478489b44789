"""Surface patterns of the shapes. They live in the shape's own coordinates, so they turn and grow with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tubelet_pipeline.synthetic.shapes import Plane

PERIOD = 0.62
"""Length of one repeat, in radii: about 11 pixels on a 128-pixel frame, so still two to three patches wide at 64."""

_WAVE = np.float32(2 * np.pi / PERIOD)
_SHARPNESS = np.float32(3.0)


def _plain(x: Plane, y: Plane) -> Plane:
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)


def _striped(x: Plane, y: Plane) -> Plane:
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
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
}
"""Share of the second tone at each point, in [0, 1], by the adjective a caption uses."""
