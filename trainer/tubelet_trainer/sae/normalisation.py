"""Normalisation of tokens by the store's moments: x_n = (x - mean) / scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tubelet_store import Moments, TubeletError


class Normalisation(nn.Module):
    """Centre and scale tokens, and undo it.

    Args:
        mean: [D]
        scale: Positive.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())

    @classmethod
    def from_moments(cls, moments: Moments) -> Normalisation:
        """scale = sqrt(total variance / D): normalised tokens have mean squared norm D, exactly.

        saev scales the mean *norm* to sqrt(D), estimated from a sample; the root of the mean squared norm follows
        from the moments of all tokens without another pass, and makes the variance that losses are divided by equal
        to D. [RECON]

        Raises:
            TubeletError: the tokens do not vary, or are not finite.
        """
        scale = math.sqrt(moments.total_variance / len(moments.mean))
        if not (math.isfinite(scale) and scale > 0):
            raise TubeletError(
                f"The stored tokens have total variance {moments.total_variance} over {moments.count} tokens",
                "An SAE needs tokens that vary: choose another hook, or check the store with `tubelet verify`",
            )
        return cls(torch.from_numpy(moments.mean).float(), torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def identity(cls, channels: int) -> Normalisation:
        """x_n = x."""
        return cls(torch.zeros(channels), torch.tensor(1.0))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalised tokens [N, D]."""
        return (x_ND - self.mean) / self.scale

    def inverse(self, normalised_ND: Tensor) -> Tensor:
        """Raw tokens [N, D]."""
        return normalised_ND * self.scale + self.mean
