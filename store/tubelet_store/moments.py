"""Statistics of the stored tokens, gathered shard by shard and merged exactly.

    per shard: count, mean, second moment about the mean ──Chan──▶ whole store, in shard order

Merging uses the pairwise update of Chan, Golub & LeVeque (1979) in float64: the result does not depend on how the
tokens were cut, up to rounding, and merging in shard order makes it bitwise repeatable. Norms are counted in fixed
logarithmic bins, so their quantiles merge exactly too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Above this width the full covariance (8 d^2 bytes a shard) is large compared with the shard: only its diagonal is
# kept.
COVARIANCE_MAX_CHANNELS = 1024

# Norm bins: 32 an octave from 2^-16 to 2^20, so a quantile is known to 2.2 %.
_BINS_PER_OCTAVE = 32
_LOWEST_EXPONENT = -16
_OCTAVES = 36
NORM_BINS = _BINS_PER_OCTAVE * _OCTAVES

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of N tokens with D channels. Build with `empty` or `of`, combine with `merge`."""

    count: int
    """Tokens seen."""
    mean: Float64
    """[D]"""
    scatter: Float64
    """Sum of (x - mean)(x - mean)^T: [D, D], or its diagonal [D] above COVARIANCE_MAX_CHANNELS."""
    absmax: Float64
    """[D] Largest absolute value per channel."""
    norm_sum: float
    """Sum of the tokens' L2 norms."""
    norm_histogram: NDArray[np.int64]
    """[NORM_BINS] Tokens by L2 norm."""
    nonfinite: int = 0
    """Values that were NaN or infinite; their clips are stored as failed and are not in the other figures."""

    @classmethod
    def empty(cls, channels: int, nonfinite: int = 0) -> Moments:
        """Moments of no tokens: the neutral element of `merge`."""
        full = channels <= COVARIANCE_MAX_CHANNELS
        return cls(
            count=0,
            mean=np.zeros(channels),
            scatter=np.zeros((channels, channels) if full else channels),
            absmax=np.zeros(channels),
            norm_sum=0.0,
            norm_histogram=np.zeros(NORM_BINS, dtype=np.int64),
            nonfinite=nonfinite,
        )

    @classmethod
    def of(cls, tokens_ND: NDArray[Any]) -> Moments:
        """Moments of `tokens_ND` [N, D], computed in float64."""
        tokens = tokens_ND.astype(np.float64)
        count, channels = tokens.shape
        if count == 0:
            return cls.empty(channels)
        mean = tokens.mean(axis=0)
        norms = np.sqrt(np.einsum("nd,nd->n", tokens, tokens))
        absmax = np.maximum(tokens.max(axis=0), -tokens.min(axis=0))
        tokens -= mean
        full = channels <= COVARIANCE_MAX_CHANNELS
        scatter = tokens.T @ tokens if full else np.einsum("nd,nd->d", tokens, tokens)
        return cls(
            count=count,
            mean=mean,
            scatter=scatter,
            absmax=absmax,
            norm_sum=float(norms.sum()),
            norm_histogram=np.bincount(_norm_bin(norms), minlength=NORM_BINS).astype(np.int64),
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together."""
        count = self.count + other.count
        if count == 0:
            return Moments.empty(len(self.mean), self.nonfinite + other.nonfinite)
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        between = np.outer(delta, delta) if self.scatter.ndim == 2 else delta * delta
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            scatter=self.scatter + other.scatter + between * weight,
            absmax=np.maximum(self.absmax, other.absmax),
            norm_sum=self.norm_sum + other.norm_sum,
            norm_histogram=self.norm_histogram + other.norm_histogram,
            nonfinite=self.nonfinite + other.nonfinite,
        )

    @cached_property
    def covariance(self) -> Float64 | None:
        """[D, D] population covariance; None above COVARIANCE_MAX_CHANNELS."""
        return self.scatter / max(self.count, 1) if self.scatter.ndim == 2 else None

    @cached_property
    def variance(self) -> Float64:
        """[D] population variance."""
        diagonal = np.diagonal(self.scatter) if self.scatter.ndim == 2 else self.scatter
        return np.asarray(diagonal / max(self.count, 1))

    @property
    def total_variance(self) -> float:
        """Mean squared distance of a token from the mean: the denominator of FVU."""
        return float(self.variance.sum())

    @property
    def norm_mean(self) -> float:
        """Mean L2 norm of the tokens as stored."""
        return self.norm_sum / max(self.count, 1)

    def norm_quantile(self, level: float) -> float:
        """L2 norm below which a fraction `level` of the tokens falls, to one bin (2.2 %). NaN without tokens."""
        if self.count == 0:
            return float("nan")
        reached = np.searchsorted(np.cumsum(self.norm_histogram), max(level * self.count, 1))
        return float(_bin_center(min(int(reached), NORM_BINS - 1)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state as arrays, for storage; `from_arrays` is the inverse."""
        return {
            "count": np.asarray(self.count, dtype=np.int64),
            "mean": self.mean,
            "covariance" if self.scatter.ndim == 2 else "variance": self.scatter / max(self.count, 1),
            "absmax": self.absmax,
            "norm_sum": np.asarray(self.norm_sum, dtype=np.float64),
            "norm_histogram": self.norm_histogram,
            "nonfinite": np.asarray(self.nonfinite, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Moments:
        """Inverse of `arrays`."""
        count = int(arrays["count"])
        spread = arrays["covariance"] if "covariance" in arrays else arrays["variance"]
        return cls(
            count=count,
            mean=arrays["mean"],
            scatter=spread * max(count, 1),
            absmax=arrays["absmax"],
            norm_sum=float(arrays["norm_sum"]),
            norm_histogram=arrays["norm_histogram"],
            nonfinite=int(arrays["nonfinite"]),
        )


def _norm_bin(norms: Float64) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        exponent = np.log2(norms)
    # A zero token has exponent -inf: it belongs to the lowest bin.
    position = np.floor((np.maximum(exponent, _LOWEST_EXPONENT) - _LOWEST_EXPONENT) * _BINS_PER_OCTAVE)
    return np.clip(position, 0, NORM_BINS - 1).astype(np.int64)


def _bin_center(position: int) -> float:
    return float(2.0 ** (_LOWEST_EXPONENT + (position + 0.5) / _BINS_PER_OCTAVE))
