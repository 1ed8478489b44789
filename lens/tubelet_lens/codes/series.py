"""A clip as time series of single features, and the products of its latent steps with each other.

    x [T, S, F] ─▶ by feature  G_f[t, u] = sum over patches of x_tpf x_upf
                ─▶ by patch    H_p[t, u] = sum over features of x_tpf x_upf

A lag, or another order of time, only selects entries (t, u) of these: all lags and all draws of the shuffled null cost
one pass over the values together, and sparse codes cost their active entries, not F.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.sparse_codes import SparseCodes


@dataclass(frozen=True, eq=False)
class FeatureProducts:
    """Of F features over the S patches of a clip, float64.

    Attributes:
        sums_TF: sum over patches of x_tpf.
        products_TTF: G.
        active_TF: int64 Patches in which the feature is not 0.
        patches: S
    """

    sums_TF: Tensor
    products_TTF: Tensor
    active_TF: Tensor
    patches: int

    @classmethod
    def of(cls, x_TSF: Tensor) -> FeatureProducts:
        """Of dense values, float64."""
        x_FTS = x_TSF.permute(2, 0, 1).contiguous()
        products_TTF = (x_FTS @ x_FTS.mT).permute(1, 2, 0).contiguous()
        return cls(x_TSF.sum(1), products_TTF, (x_TSF != 0).sum(1), x_TSF.shape[1])


def patch_products(x_TSF: Tensor) -> Tensor:
    """H of dense values, float64 [T, T, S]."""
    x_STF = x_TSF.transpose(0, 1)
    return (x_STF @ x_STF.mT).permute(1, 2, 0)


@dataclass(frozen=True, eq=False)
class Series:
    """The M series (patch, feature) of a clip that are not 0 throughout.

    Attributes:
        values_TM: float64
        patch_M: int64
        feature_M: int64
        patches: S
        features: F
    """

    values_TM: Tensor
    patch_M: Tensor
    feature_M: Tensor
    patches: int
    features: int

    @classmethod
    def of(cls, codes: SparseCodes) -> Series:
        """The series of a clip's codes."""
        steps, patches, features = codes.shape
        key_E = codes.token_E % patches * features + codes.latent_E
        fired = torch.zeros(patches * features, dtype=torch.bool, device=key_E.device)
        fired[key_E] = True
        key_M = fired.nonzero().squeeze(1)
        place = torch.empty(len(fired), dtype=torch.int64, device=key_E.device)
        place[key_M] = torch.arange(len(key_M), device=key_E.device)
        values_TM = torch.zeros(steps, len(key_M), dtype=torch.float64, device=key_E.device)
        values_TM[codes.token_E // patches, place[key_E]] = codes.value_E.double()
        return cls(values_TM, key_M // features, key_M % features, patches, features)

    def by_feature(self) -> FeatureProducts:
        """Sums over patches."""
        values_TM, of_M = self.values_TM, self.feature_M
        # Where nothing fires, bincount counts in integers whatever the dtype of its weights.
        return FeatureProducts(
            torch.stack([of_M.bincount(values_M, self.features).double() for values_M in values_TM]),
            _products(values_TM, of_M, self.features),
            torch.stack([of_M[values_M != 0].bincount(minlength=self.features) for values_M in values_TM]),
            self.patches,
        )

    def by_patch(self) -> Tensor:
        """H, [T, T, S]."""
        return _products(self.values_TM, self.patch_M, self.patches)

    def common(self) -> Tensor:
        """float64 [T, T, S] Features that are not 0 at either of two steps."""
        return _products((self.values_TM != 0).double(), self.patch_M, self.patches)


def _products(values_TM: Tensor, of_M: Tensor, count: int) -> Tensor:
    """[T, T, count]: products of two steps, summed over the series of each of `count` groups."""
    steps = len(values_TM)
    out = values_TM.new_empty(steps, steps, count)
    of_TM = of_M + count * torch.arange(steps, device=of_M.device)[:, None]
    for t in range(steps):
        later = slice(t, steps)
        products = (values_TM[t] * values_TM[later]).flatten()
        sums = of_TM[: steps - t].flatten().bincount(products, (steps - t) * count).view(-1, count)
        out[t, later], out[later, t] = sums, sums
    return out


def pairs_of_steps(valid_T: Tensor, order_T: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbors in `order_T`, both valid: int64 [pairs] of the earlier and of the later step."""
    place = (valid_T[:-1] & valid_T[1:]).nonzero().squeeze(1)
    return order_T[place], order_T[place + 1]


def pairs_at_lags(valid_T: Tensor, order_T: Tensor, lags: int) -> Tensor:
    """float64 [L, T, T]: 1 where step t comes 1 ... `lags` places before step u in `order_T`, and both are valid."""
    place_TT = nnf.one_hot(order_T, len(order_T)).double()
    both_TT = (valid_T[:, None] & valid_T).double()
    apart_LTT = torch.stack([both_TT.triu(lag).tril(lag) for lag in range(1, lags + 1)])
    return place_TT.T @ apart_LTT @ place_TT


def shuffled_steps(clips: NDArray[np.int64], valid_CT: Tensor, *, seed: int, draw: int) -> Tensor:
    """int64 [C, T]: each clip's steps in random order, the same for all its patches and features.

    Only valid steps change places, so the pairs that are masked stay the same ones. A clip's order depends on (seed,
    draw, clip) alone, not on the window it came in.
    """
    valid = valid_CT.cpu().numpy()
    order_CT = np.tile(np.arange(valid.shape[1]), (len(clips), 1))
    for place, clip in enumerate(clips):
        steps = np.flatnonzero(valid[place])
        order_CT[place, steps] = np.random.default_rng([seed, draw, int(clip)]).permutation(steps)
    return torch.from_numpy(order_CT).to(valid_CT.device)
