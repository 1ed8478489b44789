"""One-to-one matching of the latents of two dictionaries by likeness (Hungarian assignment).

cosines or correlations [A, B] ─▶ match ─▶ pairs (a, b) whose likenesses have the largest sum
learned and true directions    ─▶ recovery: how much of a known dictionary an SAE has found
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as nnf
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

FOUND = 0.9
"""A direction counts as found above this cosine."""


@dataclass(frozen=True, eq=False)
class Matching:
    """M = min(A, B) pairs.

    Attributes:
        first_M: int64 Places in the first dictionary, ascending.
        second_M: int64 Their partners' places in the second.
        likeness_M: float64 How alike the two are.
    """

    first_M: NDArray[np.int64]
    second_M: NDArray[np.int64]
    likeness_M: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean likeness of the pairs."""
        return float(self.likeness_M.mean())

    def above(self, threshold: float) -> float:
        """Share of the pairs that are more alike than `threshold`."""
        return float((self.likeness_M > threshold).mean())


@dataclass(frozen=True)
class Recovery:
    """How much of K true directions a learned dictionary holds.

    Attributes:
        mean_max_cosine: Mean over true directions of the largest cosine to a learned one; one may serve several.
        matched_cosine: Mean cosine with a learned direction for each true one alone; 0 for those left without.
        found: Share of the true directions whose matched cosine is above 0.9.
    """

    mean_max_cosine: float
    matched_cosine: float
    found: float


def cosines(first_AD: Tensor, second_BD: Tensor, signed: bool = True) -> NDArray[np.float64]:
    """float64 [A, B] Cosines of all pairs of directions; their size where `signed` is false (codes of both signs)."""
    unit_A, unit_B = (nnf.normalize(rows.double(), dim=1) for rows in (first_AD, second_BD))
    likeness: NDArray[np.float64] = (unit_A @ unit_B.T).cpu().numpy()
    return likeness if signed else np.abs(likeness)


def match(likeness_AB: NDArray[np.float64]) -> Matching:
    """The one-to-one matching with the largest sum of likenesses. Time grows with the cube of the size."""
    first, second = linear_sum_assignment(likeness_AB, maximize=True)
    return Matching(first, second, likeness_AB[first, second])


def recovery(learned_FD: Tensor, true_KD: Tensor, signed: bool = True) -> Recovery:
    """How much of the true dictionary `true_KD` the learned one holds."""
    likeness_KF = cosines(true_KD, learned_FD, signed)
    matched = match(likeness_KF)
    return Recovery(
        mean_max_cosine=float(likeness_KF.max(1).mean()),
        matched_cosine=float(matched.likeness_M.sum() / len(true_KD)),
        found=float((matched.likeness_M > FOUND).sum() / len(true_KD)),
    )
