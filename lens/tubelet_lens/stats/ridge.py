"""Ridge maps: linear least squares with an L2 penalty, for many penalties at once.

    M = argmin ||A M - E||² + penalty N ||M||²  =  (A'A + penalty N)^-1 A'E

On the coordinates of a `Basis` the columns of A are orthogonal, so A'A is diagonal and each penalty costs a division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.stats.basis import Basis


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted map from vectors [N, F] to targets [N, E], float64. Targets are centered by their mean over the rows."""

    basis: Basis
    map_RE: Tensor
    mean_E: Tensor

    def __call__(self, rows_NF: NDArray[np.floating]) -> Tensor:
        """[N, E]: predicted targets, less the mean."""
        return self.basis.coordinates(rows_NF) @ self.map_RE


def fit_ridge(
    rows_NF: NDArray[np.floating], targets_NE: Tensor, penalties: Sequence[float], device: torch.device
) -> dict[float, Ridge]:
    """A map for each penalty (per row), on standardized rows.

    Args:
        rows_NF: Vectors.
        targets_NE: float64, on `device`.
        penalties: Above 0.
        device: Where to compute.
    """
    basis = Basis.fit(rows_NF, device)
    mean_E = targets_NE.mean(0)
    cross_RE = basis.coordinates(rows_NF).T @ (targets_NE - mean_E)
    squares_R1 = basis.squares_R[:, None]
    return {penalty: Ridge(basis, cross_RE / (squares_R1 + penalty * len(rows_NF)), mean_E) for penalty in penalties}
