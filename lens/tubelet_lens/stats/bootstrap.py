"""Intervals of means over videos, by drawing the videos again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Of every interval."""

# Draws made at once: weights of 64 x 25,000 videos are 12 MB.
_CHUNK = 64


def interval(values_V: NDArray[np.float64], *, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `values_V`, one value per video.

    Give the difference of two measures of the same videos for a paired interval.
    """
    rng = np.random.default_rng(seed)
    count = len(values_V)
    means = np.empty(draws)
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        means[start : start + size] = values_V[rng.integers(0, count, (size, count))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
