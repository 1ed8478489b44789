"""Standardized vectors, turned into as few coordinates as they need.

    X [N, F] ─▶ (X - mean) / deviation ─▶ A = Xs V [N, R], columns orthogonal, R <= min(N, F)

A linear model with an L2 penalty is the same in any orthonormal basis that spans its rows, so 500 clips of 6,144
latents cost what 500 columns cost. Statistics are those of the rows it is fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Directions with less than this share of the largest variance are rounding.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, eq=False)
class Basis:
    """float64 throughout.

    Attributes:
        kept: int64 [K] Columns that vary; the others say nothing.
        mean_K: Their means.
        deviation_K: Their standard deviations.
        axes_KR: Orthonormal.
        squares_R: Squared norms of the fitted rows' coordinates, descending.
    """

    kept: NDArray[np.int64]
    mean_K: Tensor
    deviation_K: Tensor
    axes_KR: Tensor
    squares_R: Tensor

    @classmethod
    def fit(cls, rows_NF: NDArray[np.floating], device: torch.device) -> Basis:
        """The basis of `rows_NF`."""
        rows = torch.from_numpy(rows_NF).to(device, torch.float64)
        mean_F, deviation_F = rows.mean(0), rows.std(0, correction=0)
        vary = deviation_F > _NEGLIGIBLE * rows.abs().amax(0)
        rows_NK = (rows[:, vary] - mean_F[vary]) / deviation_F[vary]
        wide = rows_NK.shape[1] > rows_NK.shape[0]
        squares, vectors = torch.linalg.eigh(rows_NK @ rows_NK.T if wide else rows_NK.T @ rows_NK)
        squares, vectors = squares.flip(0), vectors.flip(1)
        real = squares > _NEGLIGIBLE * squares.amax() if len(squares) else squares > 0
        squares_R, vectors = squares[real], vectors[:, real]
        axes_KR = rows_NK.T @ vectors / squares_R.sqrt() if wide else vectors
        kept = vary.nonzero().squeeze(1).cpu().numpy()
        return cls(kept, mean_F[vary], deviation_F[vary], axes_KR, squares_R)

    def coordinates(self, rows_NF: NDArray[np.floating]) -> Tensor:
        """[N, R] of any rows."""
        rows_NK = torch.from_numpy(rows_NF[:, self.kept]).to(self.mean_K)
        return (rows_NK - self.mean_K) / self.deviation_K @ self.axes_KR

    def weights(self, weights_CR: Tensor, columns: int) -> NDArray[np.float64]:
        """[C, columns]: weights on coordinates as weights on the vectors themselves, 0 where these do not vary."""
        out = np.zeros((len(weights_CR), columns))
        out[:, self.kept] = (weights_CR @ self.axes_KR.T / self.deviation_K).cpu().numpy()
        return out
