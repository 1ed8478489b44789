"""Standardized vectors, turned into as few coordinates as they need.

    X [N, F] ─▶ (X - mean) / deviation ─▶ A = Xs V [N, R], columns orthogonal, R <= min(N, F)

A linear model with an L2 penalty is the same in any orthonormal basis that spans its rows, so 500 clips of 6,144
latents cost what 500 columns cost. Statistics are those of the rows it is fitted on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
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


@dataclass(frozen=True, eq=False)
class Probe:
    """Multinomial logistic regression on standardized vectors."""

    basis: Basis
    model: Logistic
    penalty: float

    def probabilities(self, rows_NF: NDArray[np.floating]) -> Tensor:
        """[N, C]"""
        return self.model.logits(self.basis.coordinates(rows_NF)).softmax(1)

    def weights(self, columns: int) -> NDArray[np.float64]:
        """[C, columns], in units of the vectors."""
        return self.basis.weights(self.model.weights_CR, columns)


def choose_penalty(
    rows_NF: NDArray[np.floating],
    class_N: NDArray[np.int64],
    validation_N: NDArray[np.bool_],
    classes: int,
    penalties: Sequence[float],
    device: torch.device,
) -> float:
    """The penalty with the best top-1 on the validation rows, fitted on the others; of equals that of least loss."""
    if len(set(penalties)) == 1 or not validation_N.any() or validation_N.all():
        return max(penalties)
    basis = Basis.fit(rows_NF[~validation_N], device)
    train, held = (basis.coordinates(rows_NF[part]) for part in (~validation_N, validation_N))
    wanted = torch.from_numpy(class_N).to(device)
    scores = {}
    for penalty, model in fit_path(train, wanted[torch.from_numpy(~validation_N)], classes, penalties).items():
        logits, truth = model.logits(held), wanted[torch.from_numpy(validation_N)]
        right = float((logits.argmax(1) == truth).double().mean())
        scores[penalty] = (right, -float(nnf.cross_entropy(logits, truth)))
    return max(scores, key=lambda penalty: scores[penalty])


def fit_probe(
    rows_NF: NDArray[np.floating], class_N: NDArray[np.int64], classes: int, penalty: float, device: torch.device
) -> Probe:
    """The probe of `rows_NF`."""
    basis = Basis.fit(rows_NF, device)
    wanted = torch.from_numpy(class_N).to(device)
    return Probe(basis, fit_logistic(basis.coordinates(rows_NF), wanted, classes, penalty), penalty)


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
