"""Initial weights that look at the data, and what the data's offset predicts for a start that does not.

The encoder is always a copy of the decoder's transpose: the same numbers, separate storage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tubelet_store.moments import Moments
from tubelet_trainer.sae.config import InitConfig
from tubelet_trainer.sae.model import SAE

# saev: W = 0.8 (x - mean) + 0.2 Kaiming.
_DATA_SHARE = 0.8

# Phi(-C / gamma), C as fitted by arXiv 2605.31518 over 454 layers.
_DEATH_CONSTANT = 4.26


class Offset(NamedTuple):
    """Distance of the mean token from the origin, and the latents it would silence without centering."""

    gamma: float
    """||mean|| / ||standard deviation||, of the raw tokens."""
    dead_share: float
    """Predicted share of latents that ReLU keeps silent from the start, if nothing centers the tokens."""

    @classmethod
    def of(cls, moments: Moments) -> Offset:
        """gamma and Phi(-4.26 / gamma) (mean-centring, arXiv 2605.31518)."""
        gamma = math.sqrt(float(moments.mean @ moments.mean) / moments.total_variance)
        share = 0.5 * math.erfc(_DEATH_CONSTANT / gamma / math.sqrt(2)) if gamma > 0 else 0.0
        return cls(gamma, share)


def needs_tokens(init: InitConfig) -> bool:
    """Whether `initialize` looks at tokens."""
    return init.directions != "random" or init.bias != "mean"


@torch.no_grad()
def initialize(sae: SAE, moments: Moments, tokens: Tensor | None) -> None:
    """Set the weights of a new `sae` as its recipe says.

    Args:
        sae: With random decoder rows.
        moments: Of the store.
        tokens: Raw [N, D], where `needs_tokens`.
    """
    init, x_ND = sae.config.init, None if tokens is None else sae.normalization(tokens)
    if x_ND is not None and init.bias == "geometric_median":
        sae.b_dec.copy_(geometric_median(x_ND))
    elif not sae.config.normalization.center:
        # Centered tokens have mean 0, where the bias is already.
        sae.b_dec.copy_(sae.normalization(torch.from_numpy(moments.mean).to(sae.b_dec)[None])[0])
    if x_ND is None or init.directions == "random":
        return
    generator = torch.Generator().manual_seed(sae.config.seed)
    if init.directions == "data":
        rows = torch.randint(len(x_ND), (sae.latents,), generator=generator)
        if sae.latents <= len(x_ND):
            rows = torch.randperm(len(x_ND), generator=generator)[: sae.latents]
        noise = torch.empty(sae.latents, sae.channels)
        torch.nn.init.kaiming_uniform_(noise, generator=generator)
        points = x_ND[rows.to(x_ND.device)] - sae.b_dec
        directions = _DATA_SHARE * points + (1 - _DATA_SHARE) * noise.to(points)
    else:
        width = min(init.subspace or max(1, sae.channels // 2), *x_ND.shape)
        basis_DS = torch.linalg.svd(x_ND - x_ND.mean(dim=0), full_matrices=False).Vh[:width].T
        directions = sae.W_dec[:, :width] @ basis_DS.T
    sae.W_dec.copy_(nnf.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec)


def geometric_median(x_ND: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [D] with the smallest sum of distances to the tokens, by Weiszfeld's iteration from their mean."""
    median = x_ND.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (x_ND - median).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * x_ND).sum(dim=0) / weights.sum()
        done = (moved - median).norm() <= tolerance * median.norm().clamp_min(1.0)
        median = moved
        if done:
            break
    return median
