"""Earth mover's distance of two maps of equal mass: how far mass must travel, on average, to turn one into the other.

In the plane it is a transport problem, solved exactly. Under a metric whatever both maps have in common may stay where
it is, so only the differences are transported: maps that agree cost nothing, sparse ones little. In time it has a
closed form, the area between the two cumulated profiles.
"""

from __future__ import annotations

import numpy as np
import ot
from numpy.typing import NDArray


def plane_distance(from_P: NDArray[np.float64], to_P: NDArray[np.float64], width: int) -> float:
    """Distance in patches (Euclidean) between two maps over a grid of P = height x width places, row-major.

    Args:
        from_P: Map with values of 0 or more, of sum 1.
        to_P: The same.
        width: Of the grid.

    Returns:
        Mean way of a unit of mass; exactly 0 for equal maps.
    """
    excess_P = from_P - to_P
    give, take = np.flatnonzero(excess_P > 0), np.flatnonzero(excess_P < 0)
    if not len(give) or not len(take):
        return 0.0
    supply, demand = excess_P[give], -excess_P[take]
    rows_g, columns_g = np.divmod(give, width)
    rows_t, columns_t = np.divmod(take, width)
    cost = np.hypot(rows_g[:, None] - rows_t, columns_g[:, None] - columns_t)
    # Rounding leaves the two masses apart by an ulp or so; the solver wants them equal.
    mass = supply.sum()
    demand *= mass / demand.sum()
    if len(give) == 1 or len(take) == 1:
        return float((supply[:, None] * demand * cost).sum() / mass)
    return float(ot.emd2(supply, demand, cost))


def line_distance(from_NT: NDArray[np.float64], to_NT: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N] Distances in steps between profiles over T steps, of sum 1 each: sum_t |F_t - G_t|."""
    return np.abs(np.cumsum(from_NT - to_NT, axis=1)[:, :-1]).sum(axis=1)
