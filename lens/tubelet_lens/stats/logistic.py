"""Multinomial logistic regression with an L2 penalty, to convergence.

    minimize  mean_n -log softmax(W a_n + b)[y_n]  +  penalty / 2 ||W||²        (b is not penalized)

With N rows this is scikit-learn's `LogisticRegression(C=1 / (penalty N))`. Full batches in float64, L-BFGS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

_MOST_ITERATIONS = 1000
# Largest entry of the gradient at the end; the loss is then within about its square over the penalty of the optimum.
_GRADIENT = 1e-6
# While penalties are compared by their accuracies. A weak penalty needs more: its path's start is a stronger one's end.
_ROUGHLY = 1e-4
# Numbers in the rows from which on several threads are worth their waiting for each other.
_WORTH_THREADS = 2**22


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted model, float64.

    Attributes:
        weights_CR: Rows sum to 0 over the classes.
        bias_C: The same.
    """

    weights_CR: Tensor
    bias_C: Tensor

    def logits(self, rows_NR: Tensor) -> Tensor:
        """[N, C]"""
        return rows_NR @ self.weights_CR.T + self.bias_C


def fit_logistic(
    rows_NR: Tensor,
    class_N: Tensor,
    classes: int,
    penalty: float,
    start: Logistic | None = None,
    gradient: float = _GRADIENT,
) -> Logistic:
    """The optimum.

    Args:
        rows_NR: float64
        class_N: int64, 0 ... classes - 1.
        classes: A class without a row gets a bias that falls until the gradient is negligible.
        penalty: Above 0.
        start: Where to begin; another penalty's optimum is near.
        gradient: Largest entry of the gradient at the end.
    """
    if start is None:
        zeros = rows_NR.new_zeros(classes, rows_NR.shape[1])
        counts = torch.bincount(class_N, minlength=classes).to(rows_NR)
        start = Logistic(zeros, (counts + 0.5).log() - (counts + 0.5).log().mean())
    # The loss curves along a column as its mean square; optimized in units in which it curves alike along all of them,
    # L-BFGS takes tens of steps where it would take hundreds.
    unit_R = 1 / (rows_NR.square().mean(0) / classes + penalty).sqrt()
    scaled_NR, penalties_R = rows_NR * unit_R, penalty * unit_R.square()
    weights = (start.weights_CR / unit_R).requires_grad_()
    bias = start.bias_C.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=gradient,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_NC = nnf.linear(scaled_NR, weights, bias)
        value = nnf.cross_entropy(logits_NC, class_N) + (penalties_R * weights.square()).sum() / 2
        value.backward()
        return value

    with _threads_for(scaled_NR):
        optimizer.step(loss)
    found = weights.detach() * unit_R
    return Logistic(found - found.mean(0), bias.detach() - bias.detach().mean())


@contextlib.contextmanager
def _threads_for(rows_NR: Tensor) -> Iterator[None]:
    """One thread where the products are small: several would wait for each other at each of hundreds of steps (on 224
    rows of 200 numbers and a busy machine, seven times the time)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if rows_NR.numel() < _WORTH_THREADS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_path(rows_NR: Tensor, class_N: Tensor, classes: int, penalties: Sequence[float]) -> dict[float, Logistic]:
    """Close to the optimum for each penalty, the strongest first, each begun at the one before."""
    found: dict[float, Logistic] = {}
    last = None
    for penalty in sorted(set(penalties), reverse=True):
        enough = min(_ROUGHLY, max(_GRADIENT, penalty / 100))
        last = found[penalty] = fit_logistic(rows_NR, class_N, classes, penalty, last, enough)
    return found
