"""Ranks of right answers in a gallery, ties told apart from order.

rank = 1 + wrong items that score higher + half of the wrong items that score the same
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ranks:
    """Rank of the best right item of each of Q queries, from 1.

    Attributes:
        optimistic: [Q] Ties count for the right item.
        pessimistic: [Q] Against it.
        chance_r1: Probability that an item drawn at random is right, mean over the queries.
    """

    optimistic: NDArray[np.int64]
    pessimistic: NDArray[np.int64]
    chance_r1: float

    @property
    def rank(self) -> NDArray[np.float64]:
        """[Q] Half-way between the two: 1 + #greater + #ties / 2."""
        return (self.optimistic + self.pessimistic) / 2

    def recall(self, top: int) -> NDArray[np.float64]:
        """[Q] Whether the rank is at most `top`."""
        return (self.rank <= top).astype(np.float64)


def ranks(scores_QG: NDArray[np.float64], right_QG: NDArray[np.bool_]) -> Ranks:
    """Ranks of the best right item in a gallery of G.

    Args:
        scores_QG: Higher is nearer.
        right_QG: At least one per query. Right items never count against each other.
    """
    best_Q1 = np.where(right_QG, scores_QG, -np.inf).max(axis=1, keepdims=True)
    wrong = ~right_QG
    greater = (wrong & (scores_QG > best_Q1)).sum(axis=1)
    equal = (wrong & (scores_QG == best_Q1)).sum(axis=1)
    return Ranks(1 + greater, 1 + greater + equal, float(right_QG.mean()))
