"""Linear models of pooled clips, from scikit-learn, on vectors standardized by the rows they are fitted on.

    choose_penalty, fit_probe     multinomial logistic regression: which class
    fit_ridge                     ridge regression: which embedding
    interval                      bootstrap interval of a mean over videos

A penalty is per row: loss = mean over rows + penalty / 2 ||W||². Fits run on the CPU in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as RidgeRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

LEVEL = 0.95
"""Of every interval."""

# Largest entry of the gradient at the end of a fit.
_GRADIENT = 1e-6
_MAX_ITERATIONS = 1000
# Below this many numbers a product is too small for several threads: they would wait for each other at every step.
_WORTH_THREADS = 2**22
# Bootstrap means computed at once: 64 draws of 25,000 videos are 12 MB.
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted multinomial logistic regression, in units of the vectors.

    Attributes:
        weights_CF: float64; 0 for columns that did not vary.
        bias_C: float64; -inf for a class without a fitted row.
    """

    weights_CF: NDArray[np.float64]
    bias_C: NDArray[np.float64]

    def logits(self, rows_NF: NDArray[np.floating]) -> NDArray[np.float64]:
        """float64 [N, C]"""
        logits_NC: NDArray[np.float64] = rows_NF.astype(np.float64) @ self.weights_CF.T + self.bias_C
        return logits_NC

    def probabilities(self, rows_NF: NDArray[np.floating]) -> NDArray[np.float64]:
        """float64 [N, C]; rows sum to 1."""
        return softmax(self.logits(rows_NF))


def softmax(logits_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities; rows sum to 1."""
    exponentials_NC: NDArray[np.float64] = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return exponentials_NC / exponentials_NC.sum(axis=1, keepdims=True)


def choose_penalty(
    rows_NF: NDArray[np.floating],
    class_N: NDArray[np.int64],
    validation_N: NDArray[np.bool_],
    classes: int,
    penalties: Sequence[float],
) -> float:
    """The penalty of best top-1 on the validation rows, fitted on the others; among equals that of least log loss."""
    if len(set(penalties)) == 1 or not validation_N.any() or validation_N.all():
        return max(penalties)
    held_NF, truth_N = rows_NF[validation_N], class_N[validation_N]
    scores = {}
    for penalty, probe in _fits(rows_NF[~validation_N], class_N[~validation_N], classes, penalties):
        probabilities_NC = probe.probabilities(held_NF)
        top1 = float((probabilities_NC.argmax(1) == truth_N).mean())
        scores[penalty] = (top1, -float(log_loss(truth_N, probabilities_NC, labels=np.arange(classes))))
    return max(scores, key=lambda penalty: scores[penalty])


def fit_probe(rows_NF: NDArray[np.floating], class_N: NDArray[np.int64], classes: int, penalty: float) -> Probe:
    """The optimum.

    Args:
        rows_NF: Vectors.
        class_N: 0 ... `classes` - 1; a class without a row is never predicted.
        classes: C
        penalty: Above 0.
    """
    [(_, probe)] = _fits(rows_NF, class_N, classes, (penalty,))
    return probe


def _fits(
    rows_NF: NDArray[np.floating], class_N: NDArray[np.int64], classes: int, penalties: Sequence[float]
) -> Iterator[tuple[float, Probe]]:
    """A probe for each penalty, the strongest first; each fit starts at the one before."""
    scaler = StandardScaler()
    standard_NF = scaler.fit_transform(rows_NF.astype(np.float64))
    present = np.unique(class_N)
    # scikit-learn fits two classes with one logit, w_1 - w_0 = 2 w_1: the same model has half the penalty there.
    logits = 2 if len(present) == 2 else 1
    model = LogisticRegression(tol=_GRADIENT, max_iter=_MAX_ITERATIONS, warm_start=True)
    for penalty in sorted(set(penalties), reverse=True):
        weights_CF, bias_C = np.zeros((classes, rows_NF.shape[1])), np.full(classes, -np.inf)
        bias_C[present] = 0
        if len(present) > 1:
            model.set_params(C=logits / (penalty * len(rows_NF)))
            with _threads_for(standard_NF), warnings.catch_warnings():
                # Few clips per class are the rule here, not a sign of regression targets.
                warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
                model.fit(standard_NF, class_N)
            coefficients, intercepts = model.coef_, model.intercept_
            if logits == 2:
                coefficients, intercepts = (np.concatenate([-half, half]) / 2 for half in (coefficients, intercepts))
            weights_CF[present] = coefficients / scaler.scale_
            bias_C[present] = intercepts - weights_CF[present] @ scaler.mean_
        yield penalty, Probe(weights_CF, bias_C)


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted map from vectors [N, F] to targets [N, E], float64. Targets are centered by their mean over the rows."""

    scaler: StandardScaler
    model: RidgeRegression
    mean_E: NDArray[np.float64]

    def __call__(self, rows_NF: NDArray[np.floating]) -> NDArray[np.float64]:
        """float64 [N, E]: predicted targets, less the mean."""
        predicted_NE: NDArray[np.float64] = self.model.predict(self.scaler.transform(rows_NF.astype(np.float64)))
        return predicted_NE


def fit_ridge(
    rows_NF: NDArray[np.floating], targets_NE: NDArray[np.float64], penalties: Sequence[float]
) -> dict[float, Ridge]:
    """M = argmin ||A M - E||² + penalty N ||M||² for each penalty, with A the N standardized rows.

    Args:
        rows_NF: Vectors.
        targets_NE: float64
        penalties: Above 0.
    """
    scaler, mean_E = StandardScaler(), targets_NE.mean(0)
    standard_NF = scaler.fit_transform(rows_NF.astype(np.float64))
    return {
        penalty: Ridge(
            scaler,
            RidgeRegression(alpha=penalty * len(rows_NF), fit_intercept=False).fit(standard_NF, targets_NE - mean_E),
            mean_E,
        )
        for penalty in penalties
    }


def interval(values_V: NDArray[np.float64], *, draws: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values_V`, one value per video.

    Give the difference of two measures of the same videos for a paired interval.
    """
    if len(values_V) < 2:
        return float(values_V.mean()), float(values_V.mean())
    rng = np.random.default_rng(seed)
    settings = {"n_resamples": draws, "batch": _BATCH, "confidence_level": LEVEL, "method": "percentile", "rng": rng}
    low, high = bootstrap((values_V,), np.mean, **settings).confidence_interval
    return float(low), float(high)


@contextmanager
def _threads_for(rows_NF: NDArray[np.float64]) -> Iterator[None]:
    """One thread where the products are small."""
    with threadpool_limits(1 if rows_NF.size < _WORTH_THREADS else None):
        yield
