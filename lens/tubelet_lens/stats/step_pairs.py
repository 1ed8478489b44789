"""Statistics of pairs of latent steps: autocorrelation, cosine, overlap of supports.

    pooled          per feature over all pairs (z[v,t,p], z[v,t+lag,p]) of all clips v, patches p, steps t
    within series   per (clip, patch, feature) about its own mean, then averaged: biased by -1/T

Both are sums over pairs, accumulated in float64 and exact however the clips are cut into windows. Two estimators, never
mixed: the pooled one counts differences between clips as coherence (the same object is still there), the other not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet_lens.codes.series import FeatureProducts, pairs_of_steps
from tubelet_lens.results.section import ratio

# Relative to a mean square, below this a variance is rounding.
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class PooledValue:
    """Pooled autocorrelation at one lag, summarized over features.

    Attributes:
        mean: Mean over the features for which it is defined; None if there is none.
        median: Median over them.
        weighted_mean: Mean weighted by activity.
        features: How many.
        pairs: Pairs of tokens behind each of them.
    """

    mean: float | None
    median: float | None
    weighted_mean: float | None
    features: int
    pairs: int


class PooledAutocorrelation:
    """Pooled autocorrelation at lags 1 ... `lags` of `features` features."""

    def __init__(self, features: int, lags: int, device: torch.device) -> None:
        # Rows: sum x, sum y, sum x^2, sum y^2, sum x y of pairs (x now, y later).
        self._sums_L5F = torch.zeros(lags, 5, features, dtype=torch.float64, device=device)
        self._pairs_L = torch.zeros(lags, dtype=torch.float64, device=device)
        self.active_F = torch.zeros(features, dtype=torch.float64, device=device)
        """Valid tokens on which the feature is not zero."""

    def add(self, clip: FeatureProducts, valid_T: Tensor, pairs_LTT: Tensor) -> None:
        """Add a clip's pairs of steps, see `series.pairs_at_lags`."""
        self.active_F += clip.active_TF[valid_T].sum(0)
        self._pairs_L += clip.patches * pairs_LTT.sum((1, 2))
        squares_TF = clip.products_TTF.diagonal(dim1=0, dim2=1).T
        early_LT, late_LT = pairs_LTT.sum(2), pairs_LTT.sum(1)
        self._sums_L5F += torch.stack(
            [
                early_LT @ clip.sums_TF,
                late_LT @ clip.sums_TF,
                early_LT @ squares_TF,
                late_LT @ squares_TF,
                pairs_LTT.flatten(1) @ clip.products_TTF.flatten(0, 1),
            ],
            1,
        )

    def per_feature(self, lag: int) -> Tensor:
        """float64 [F] Correlation at `lag`; NaN where a feature does not vary over the pairs."""
        pairs = max(int(self._pairs_L[lag - 1]), 1)
        sx, sy, sxx, syy, sxy = self._sums_L5F[lag - 1]
        vx, vy = sxx - sx * sx / pairs, syy - sy * sy / pairs
        defined = (vx > _NO_VARIANCE * sxx) & (vy > _NO_VARIANCE * syy)
        rho = (sxy - sx * sy / pairs) / (vx.clamp_min(0) * vy.clamp_min(0)).sqrt()
        return torch.where(defined, rho, torch.full_like(rho, torch.nan))

    def value(self, lag: int) -> PooledValue:
        """Summary at `lag` over the features for which it is defined."""
        rho_F, pairs = self.per_feature(lag), int(self._pairs_L[lag - 1])
        defined = ~torch.isnan(rho_F)
        if not bool(defined.any()):
            return PooledValue(None, None, None, 0, pairs)
        rho, weight = rho_F[defined], self.active_F[defined]
        return PooledValue(
            mean=float(rho.mean()),
            median=float(rho.quantile(0.5)) if len(rho) < 2**24 else float(rho.median()),
            weighted_mean=float((rho * weight).sum() / weight.sum()),
            features=len(rho),
            pairs=pairs,
        )


class WithinAutocorrelation:
    """Mean lag-1 autocorrelation about each series' own mean, over clips without invalid steps.

    `rho = sum_t (z_t - zbar)(z_{t+1} - zbar) / sum_t (z_t - zbar)^2`. In random order of time its expectation is
    exactly -1/T whatever the values, which is the bias to subtract before two values of T are compared.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self.defined = 0
        """Series that vary."""
        self.active = 0
        """Series that are not zero throughout."""

    def add(self, values_TM: Tensor, valid_T: Tensor) -> None:
        """Add the series, float64, of a clip; nothing if one of its steps is not valid."""
        if not bool(valid_T.all()):
            return
        centered_TM = values_TM - values_TM.mean(0)
        variance_M = centered_TM.square().sum(0)
        squares_M = values_TM.square().sum(0)
        defined = variance_M > _NO_VARIANCE * squares_M
        products_M = (centered_TM[:-1] * centered_TM[1:]).sum(0)
        self._sum += float((products_M[defined] / variance_M[defined]).sum())
        self.defined += int(defined.sum())
        self.active += int((squares_M > 0).sum())

    @property
    def mean(self) -> float | None:
        """Mean over the series that vary; None if there is none."""
        return self._sum / self.defined if self.defined else None


class StepCosine:
    """Cosine of each token's vector with that of the same patch one step later."""

    def __init__(self) -> None:
        self._sum = 0.0
        self.pairs = 0
        """Pairs in which neither vector is zero."""

    def add(self, products_TTS: Tensor, valid_T: Tensor, order_T: Tensor) -> None:
        """Add a clip, given the products of its steps patch by patch, with its steps in the order `order_T`."""
        early, late = pairs_of_steps(valid_T, order_T)
        squares = products_TTS[early, early] * products_TTS[late, late]
        both = squares > 0
        self._sum += float((products_TTS[early, late][both] / squares[both].sqrt()).sum())
        self.pairs += int(both.sum())

    @property
    def mean(self) -> float | None:
        """Mean over the pairs."""
        return ratio(self._sum, self.pairs)


class SupportOverlap:
    """Comparison of the set S_t of a token's active latents with that of the same patch one step later.

    [RECON] The flip rate of a code with k active latents per token is 1 - |S_t & S_t+1| / k. Here |S_t| replaces k: the
    same where k latents are active, and defined where their number varies (BatchTopK, JumpReLU, ReLU, and TopK where
    fewer than k values are positive). Tokens without an active latent are left out.
    """

    def __init__(self) -> None:
        self._jaccard = self._flip = 0.0
        self.jaccard_pairs = 0
        """Pairs in which at least one code is not zero."""
        self.flip_pairs = 0
        """Pairs in which the earlier code is not zero."""

    def add(self, common_TTS: Tensor, valid_T: Tensor, order_T: Tensor) -> None:
        """Add a clip, given |S_t & S_u| patch by patch, with its steps in the order `order_T`."""
        x, y = pairs_of_steps(valid_T, order_T)
        early, late, both = common_TTS[x, x], common_TTS[y, y], common_TTS[x, y]
        union = early + late - both
        self._jaccard += float((both[union > 0] / union[union > 0]).sum())
        self.jaccard_pairs += int((union > 0).sum())
        self._flip += float((1 - both[early > 0] / early[early > 0]).sum())
        self.flip_pairs += int((early > 0).sum())

    @property
    def jaccard(self) -> float | None:
        """Mean of |S_t & S_t+1| / |S_t | S_t+1|."""
        return ratio(self._jaccard, self.jaccard_pairs)

    @property
    def flip_rate(self) -> float | None:
        """Mean of 1 - |S_t & S_t+1| / |S_t|."""
        return ratio(self._flip, self.flip_pairs)
