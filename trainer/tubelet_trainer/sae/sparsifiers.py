"""Sparsifiers: which pre-activations of a batch become codes, and with what value.

    pre-activations [N, F] ──choose──▶ indices [N, K], keep [N, K] ──values──▶ codes [N, K]

BatchTopK in training keeps different numbers per token: its choice is one list of entries, with `bags`.

Choosing has no gradient. The model takes the chosen pre-activations with theirs and hands them to `values`; for most
kinds that is a mask. Kinds that keep many latents choose all of them (K = F, the indices 0 to F - 1); the model then
takes the dense path by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tubelet.errors import TubeletError
from tubelet_trainer.device_scalar import DeviceScalar
from tubelet_trainer.sae.config import (
    AbsTopKConfig,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)
from tubelet_trainer.sae.sparse_ops import Bags, every_latent, largest


class Choice(NamedTuple):
    """Latents chosen per token."""

    indices: Tensor
    """int64 [N, K], or [E] with `bags`; distinct within a token."""
    keep: Tensor
    """bool, as indices; False entries are padding or not active: their code is 0."""
    bags: Bags | None = None
    """Whose the entries of a list are."""


class Sparsifier(nn.Module, ABC):
    """Chooses from pre-activations; `training` distinguishes a training batch from inference."""

    stackable: ClassVar[bool] = False
    """One choice may be made for the tokens of several SAEs of the same shape (see `tubelet_trainer.optim.stacked`)."""

    @abstractmethod
    def forward(self, pre_NF: Tensor) -> Choice:
        """Choose latents from pre-activations [N, F] (no gradient flows through the choice)."""

    def values(self, selected_NK: Tensor, choice: Choice, _b_enc: Tensor) -> Tensor:
        """Codes [N, K] from the chosen pre-activations.

        Args:
            selected_NK: Chosen pre-activations, with gradient.
            choice: What was chosen.
            _b_enc: [F] The encoder's bias, which is part of `selected_NK`.
        """
        return selected_NK * choice.keep


class ReLU(Sparsifier):
    """max(pre, 0)."""

    def forward(self, pre_NF: Tensor) -> Choice:
        """All latents."""
        return Choice(every_latent(pre_NF), pre_NF > 0)


class TopK(Sparsifier):
    """ReLU(TopK(pre)): the k largest of each token, if positive (Gao et al. 2024, section 2.3)."""

    stackable = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_NF: Tensor) -> Choice:
        """The k largest of each token; K = k."""
        if self.k == pre_NF.shape[1]:
            return Choice(every_latent(pre_NF), pre_NF > 0)
        values, indices = largest(pre_NF, self.k)
        return Choice(indices, values > 0)


class AbsTopK(Sparsifier):
    """The k of largest magnitude, with their sign and without ReLU (arXiv 2510.00404).

    Codes may be negative. What assumes codes >= 0 (monosemanticity, densities) has to look at max(z, 0) and max(-z, 0)
    as two latents.
    """

    stackable = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_NF: Tensor) -> Choice:
        """The k of largest magnitude of each token; K = k."""
        if self.k == pre_NF.shape[1]:
            return Choice(every_latent(pre_NF), pre_NF != 0)
        values, indices = largest(pre_NF.abs(), self.k)
        return Choice(indices, values > 0)


class BatchTopK(Sparsifier):
    """The N k largest positive pre-activations of a training batch; all above a threshold at inference.

    The threshold is a running mean of each training batch's smallest kept pre-activation (Bussmann et al. 2024, section
    3.2), started at the first batch's. At inference a token's code does not depend on the other tokens.

    Args:
        k: Active latents per token, on average.
        momentum: Weight of the newest batch in the running mean.
    """

    stackable = True
    threshold: Tensor

    def __init__(self, k: int, momentum: float) -> None:
        super().__init__()
        self.k = k
        self.momentum = momentum
        # Negative: no batch seen yet. A kept pre-activation is always positive.
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.rate = DeviceScalar(momentum)
        """Weight of the next batch: more than `momentum` early in a run, less where it is short, see `SAE.anneal`."""

    def forward(self, pre_NF: Tensor) -> Choice:
        """In training a list of N k entries; at inference K is the largest number kept by any token, at least 1
        (reading it synchronizes with the device)."""
        if self.training:
            values_1E, places_1E = largest(pre_NF.reshape(1, -1), self.budget(pre_NF))
            return self.chosen(values_1E[0], places_1E[0], pre_NF)
        kept = (pre_NF > 0) & (pre_NF >= self.threshold)
        width = max(1, int(kept.sum(dim=1).max())) if len(kept) else 1
        if width == pre_NF.shape[1]:
            return Choice(every_latent(pre_NF), kept)
        top = torch.where(kept, pre_NF, 0).topk(width, dim=1, sorted=False)
        return Choice(top.indices, top.values > 0)

    def budget(self, pre_NF: Tensor) -> int:
        """Entries of a training batch."""
        return min(self.k * len(pre_NF), pre_NF.numel())

    def chosen(self, values_E: Tensor, places_E: Tensor, pre_NF: Tensor) -> Choice:
        """The choice from the largest pre-activations and their places in the flat batch; learns the threshold."""
        places_E, order = places_E.sort()
        keep = self._keep(values_E[order])
        smallest = torch.where(keep, values_E[order], torch.inf)
        # Infinity is appended because a rank may have no token of a short last batch.
        self._learn(torch.cat([smallest, smallest.new_full((1,), torch.inf)]).amin())
        tokens, latents = pre_NF.shape
        return Choice(places_E % latents, keep, Bags.sorted(places_E // latents, tokens))

    def _keep(self, values_E: Tensor) -> Tensor:
        """bool: which of the `budget` largest."""
        return values_E > 0

    def _learn(self, smallest: Tensor) -> None:
        """Move the threshold toward the smallest kept pre-activation of a batch; infinite if none was positive."""
        smallest = smallest.to(self.threshold.dtype)
        rate = self.rate.on(smallest.device).to(smallest.dtype)
        moved = torch.where(self.threshold < 0, smallest, self.threshold + rate * (smallest - self.threshold))
        # A batch in which nothing is positive says nothing about the threshold.
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))


class JumpReLU(Sparsifier):
    """pre where it exceeds the latent's threshold, else 0 (Rajamanoharan et al. 2024b).

    Thresholds are exp(log_threshold), so they stay positive. They learn through the pseudo-derivatives of section 3:
    with the rectangle kernel K of width eps around the threshold,

        d JumpReLU / d theta = -(theta / eps) K((pre - theta) / eps)
        d Heaviside / d theta = -(1 / eps) K((pre - theta) / eps)

    Both look at *pre*-activations: latents just below their threshold count.

    Args:
        latents: F.
        initial_threshold: Where all thresholds start.
        bandwidth: eps. Like the thresholds in the units of pre-activations.
    """

    def __init__(self, latents: int, initial_threshold: float, bandwidth: float) -> None:
        super().__init__()
        self.initial_threshold = initial_threshold
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((latents,), math.log(initial_threshold)))

    @property
    def threshold(self) -> Tensor:
        """[F] Positive."""
        return self.log_threshold.exp()

    def forward(self, pre_NF: Tensor) -> Choice:
        """All latents."""
        return Choice(every_latent(pre_NF), pre_NF > self.threshold.detach())

    def values(self, selected_NK: Tensor, _choice: Choice, _b_enc: Tensor) -> Tensor:
        """JumpReLU of all pre-activations (K = F)."""
        out: Tensor = _JumpReLU.apply(selected_NK, self.threshold, self.bandwidth)
        return out

    def active(self, pre_NF: Tensor) -> Tensor:
        """Number of active latents of all tokens, 0-dimensional, with gradient to the thresholds alone."""
        active: Tensor = _Heaviside.apply(pre_NF, self.threshold, self.bandwidth)
        return active.sum()


class Gated(Sparsifier):
    """1[gate > 0] ReLU(magnitude), the two sharing the encoder's directions (Rajamanoharan et al. 2024a, section 3.2).

    gate = W_enc (x - b_dec) + b_enc;  magnitude = exp(r_mag) W_enc (x - b_dec) + b_mag.
    """

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(latents))
        self.b_mag = nn.Parameter(torch.zeros(latents))

    def forward(self, pre_NF: Tensor) -> Choice:
        """All latents; `pre_NF` is the gate."""
        return Choice(every_latent(pre_NF), pre_NF > 0)

    def values(self, selected_NK: Tensor, choice: Choice, b_enc: Tensor) -> Tensor:
        """Magnitudes where the gate is open (K = F)."""
        magnitude = self.r_mag.exp() * (selected_NK - b_enc) + self.b_mag
        return magnitude.relu() * choice.keep


def _kernel(pre_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    return (((pre_NF - threshold_F) / bandwidth).abs() < 0.5).to(pre_NF.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_NF, threshold_F)
        ctx.bandwidth = bandwidth
        return pre_NF * (pre_NF > threshold_F)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_NF, threshold_F = ctx.saved_tensors
        near = (_kernel(pre_NF, threshold_F, ctx.bandwidth) * grad_NF).sum(dim=0)
        return grad_NF * (pre_NF > threshold_F), -threshold_F / ctx.bandwidth * near, None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_NF, threshold_F)
        ctx.bandwidth = bandwidth
        return (pre_NF > threshold_F).to(threshold_F.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[None, Tensor, None]:
        pre_NF, threshold_F = ctx.saved_tensors
        near = (_kernel(pre_NF, threshold_F, ctx.bandwidth) * grad_NF).sum(dim=0)
        return None, -near / ctx.bandwidth, None


def build_sparsifier(config: SAEConfig, latents: int, unit: float = 1.0) -> Sparsifier:
    """The sparsifier that `config` names, for a dictionary of `latents`; `unit` is `Normalization.unit`."""
    match config:
        case TopKConfig():
            return TopK(config.k)
        case BatchTopKConfig():
            return BatchTopK(config.k, config.threshold_momentum)
        case AbsTopKConfig():
            return AbsTopK(config.k)
        case ReLUConfig():
            return ReLU()
        case GatedConfig():
            return Gated(latents)
        case JumpReLUConfig():
            return JumpReLU(latents, config.initial_threshold * unit, config.bandwidth * unit)
    raise TubeletError(
        f"No sparsifier for {type(config).__name__}", "Use one of the kinds in tubelet_trainer.sae.config"
    )
