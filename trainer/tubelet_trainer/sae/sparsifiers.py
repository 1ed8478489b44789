"""Sparsifiers: which pre-activations of a batch become codes.

    pre-activations [N, F] ──sparsifier──▶ indices [N, K] and keep [N, K]

A sparsifier chooses, it does not compute values: the model takes the chosen pre-activations (with their gradient) and
sets those not kept to 0. So every sparsifier has the same sparse path, on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tubelet_store import TubeletError
from tubelet_trainer.sae.config import BatchTopKConfig, SAEConfig, TopKConfig


class Choice(NamedTuple):
    """Latents chosen per token."""

    indices_NK: Tensor
    """int64, distinct within a token."""
    keep_NK: Tensor
    """bool; False entries are padding or not positive: their code is 0."""


class Sparsifier(nn.Module):
    """Chooses from pre-activations; `training` tells a training batch from inference."""

    def forward(self, pre_NF: Tensor) -> Choice:
        """Choose latents from pre-activations [N, F] (no gradient flows through the choice)."""
        raise NotImplementedError


class TopK(Sparsifier):
    """ReLU(TopK(pre)): the k largest of each token, if positive (Gao et al. 2024, section 2.3)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_NF: Tensor) -> Choice:
        """The k largest of each token; K = k."""
        top = pre_NF.topk(self.k, dim=1, sorted=False)
        return Choice(top.indices, top.values > 0)


class BatchTopK(Sparsifier):
    """The N k largest positive pre-activations of a training batch; all above a threshold at inference.

    The threshold is a running mean of each training batch's smallest kept pre-activation (Bussmann et al. 2024, section
    3.2), started at the first batch's. At inference a token's code does not depend on the tokens beside it. Ties at the
    smallest kept value are all kept.
    """

    threshold: Tensor

    def __init__(self, k: int, momentum: float) -> None:
        super().__init__()
        self.k = k
        self.momentum = momentum
        # Negative: no batch seen yet. A kept pre-activation is always positive.
        self.register_buffer("threshold", torch.tensor(-1.0))

    def forward(self, pre_NF: Tensor) -> Choice:
        """K is the largest number kept by any token, at least 1."""
        positive = pre_NF.relu()
        if self.training:
            budget = min(self.k * len(positive), positive.numel())
            smallest = positive.flatten().topk(budget, sorted=False).values.min()
            kept = (positive > 0) & (positive >= smallest)
            self._learn(positive, kept)
        else:
            kept = (positive > 0) & (positive >= self.threshold)
        width = max(1, int(kept.sum(dim=1).max())) if len(kept) else 1
        top = torch.where(kept, positive, 0).topk(width, dim=1, sorted=False)
        return Choice(top.indices, top.values > 0)

    def _learn(self, positive: Tensor, kept: Tensor) -> None:
        smallest = torch.where(kept, positive, torch.inf).amin()
        first = self.threshold < 0
        moved = torch.where(first, smallest, self.threshold + self.momentum * (smallest - self.threshold))
        # A batch in which nothing is positive says nothing about the threshold.
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))


def build_sparsifier(config: SAEConfig) -> Sparsifier:
    """The sparsifier that `config` names."""
    if isinstance(config, TopKConfig):
        return TopK(config.k)
    if isinstance(config, BatchTopKConfig):
        return BatchTopK(config.k, config.threshold_momentum)
    raise TubeletError(f"No sparsifier for {type(config).__name__}", "Use TopKConfig or BatchTopKConfig")
