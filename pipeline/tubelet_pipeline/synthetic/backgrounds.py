"""What lies behind the shapes: one still picture per scene, quiet enough that the shapes stand out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tubelet_pipeline.synthetic.palette import Color

Pattern = Callable[[np.random.Generator, int, int], NDArray[np.float64]]
"""(rng, height, width) -> brightness offsets [height, width], in [-1, 1]."""

CONTRAST = 0.17
"""Brightness swing of a pattern, as a share of the base color."""


def _plain(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    del rng
    return np.zeros((height, width))


def _gradient(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    along = _ramp(rng.uniform(0, 2 * np.pi), height, width)
    return 1.6 * along / np.abs(along).max()


def _striped(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
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


PATTERNS: dict[str, Pattern] = {"plain": _plain, "gradient": _gradient, "striped": _striped, "cloudy": _cloudy}


def paint(rng: np.random.Generator, pattern: str, color: Color, height: int, width: int) -> NDArray[np.float32]:
    """Background picture, float32 [height, width, 3] in 0..255."""
    swing = 1 + CONTRAST * PATTERNS[pattern](rng, height, width)
    return np.clip(swing[:, :, None] * np.array(color), 0, 255).astype(np.float32)
