"""Normalization of tokens by the store's moments, always an affine map that can be folded into an SAE's weights.

x_n = (x - mean) / scale                 center, scale
x_n = (x - mean) whiten                  whitening, [D, D]
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_trainer.sae.config import NormalizationConfig


class Normalization(nn.Module):
    """Center and scale or whiten tokens, and undo it.

    Args:
        mean: [D]
        scale: Positive, 0-dimensional; 1 with whitening.
        whiten: [D, D] or None. Applied from the right.
        unwhiten: Its inverse.
        unit: Root of the normalized channels' mean variance: how large numbers are in the space the weights live in.
            Decides where training starts, not what a trained SAE computes; so it is not part of the state.
    """

    mean: Tensor
    scale: Tensor
    whiten: Tensor | None
    unwhiten: Tensor | None

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        whiten: Tensor | None = None,
        unwhiten: Tensor | None = None,
        unit: float = 1.0,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("whiten", None if whiten is None else whiten.clone())
        self.register_buffer("unwhiten", None if unwhiten is None else unwhiten.clone())

    @classmethod
    def from_moments(cls, moments: Moments, config: NormalizationConfig | None = None) -> Normalization:
        """The normalization that `config` describes; None: center and scale.

        scale = sqrt(total variance / D): centered tokens then have mean squared norm D, exactly. [RECON] saev scales
        the mean *norm* to sqrt(D), estimated from a sample; the root of the mean squared norm follows from the moments
        of all tokens without another pass.

        Whitening, from the covariance V diag(l) V^T: zca is V diag(l + s)^(-1/2) V^T, pca V diag(l + s)^(-1/2), where s
        is the shrinkage times the mean variance; both times one number, so that the total variance is D again.

        Raises:
            TubeletError: the tokens do not vary or are not finite; whitening without a stored covariance.
        """
        config = config or NormalizationConfig()
        channels = len(moments.mean)
        scale = math.sqrt(moments.total_variance / channels)
        if not (math.isfinite(scale) and scale > 0):
            raise TubeletError(
                f"The stored tokens have total variance {moments.total_variance} over {moments.count} tokens",
                "An SAE needs tokens that vary: choose another hook, or check the store with `tubelet verify`",
            )
        mean = moments.mean if config.center else np.zeros(channels)
        center = torch.from_numpy(mean).float()
        if config.whitening == "none":
            if not config.scale:
                return cls(center, torch.tensor(1.0), unit=scale)
            return cls(center, torch.tensor(scale, dtype=torch.float32))
        if moments.covariance is None:
            raise TubeletError(
                f"Whitening needs the covariance, which a store keeps for up to 1024 channels; these are {channels}",
                "Use --sae.normalization.whitening none",
            )
        spread, axes = np.linalg.eigh(moments.covariance)
        spread = np.maximum(spread, 0)
        regular = spread + config.shrinkage * spread.mean()
        gain = math.sqrt(channels / (spread / regular).sum()) / np.sqrt(regular)
        turn = axes.T if config.whitening == "zca" else np.eye(channels)
        whiten, unwhiten = (axes * gain) @ turn, turn.T @ (axes / gain).T
        return cls(center, torch.tensor(1.0), torch.from_numpy(whiten).float(), torch.from_numpy(unwhiten).float())

    @classmethod
    def identity(cls, channels: int, whitening: bool = False) -> Normalization:
        """x_n = x; with `whitening`, through matrices, so that a whitening can be loaded into it."""
        matrix = torch.eye(channels) if whitening else None
        return cls(torch.zeros(channels), torch.tensor(1.0), matrix, matrix)

    def variance(self, moments: Moments) -> float:
        """Total variance of the normalized tokens."""
        if self.whiten is None:
            return moments.total_variance / float(self.scale) ** 2
        whiten = self.whiten.double().cpu().numpy()
        return float(np.einsum("ij,ik,kj->", whiten, np.asarray(moments.covariance), whiten, optimize=True))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalized tokens [N, D]."""
        centered = x_ND - self.mean
        return centered / self.scale if self.whiten is None else centered @ self.whiten

    def inverse(self, normalized_ND: Tensor) -> Tensor:
        """Raw tokens [N, D]."""
        return self.raw_difference(normalized_ND) + self.mean

    def raw_difference(self, difference_ND: Tensor) -> Tensor:
        """What a difference of normalized tokens [N, D] is between raw ones."""
        return difference_ND * self.scale if self.unwhiten is None else difference_ND @ self.unwhiten
