"""Untrained encoders as controls: width alone helps a probe, so an SAE's codes must do better than these.

    untrained     the SAE's recipe with fresh weights, started as its training would start
    random_topk   a Gaussian projection to as many latents, the k largest of each token kept if positive

For a TopK recipe that starts from random directions the two differ in the norms of the projections only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from tubelet_lens.codes.sparse_codes import Encoder
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.inputs.trained_sae import TrainedSae
from tubelet_lens.results.section import Subject
from tubelet_store.reader import Store
from tubelet_trainer.sae.config import AnySAEConfig, SAEConfig
from tubelet_trainer.sae.init import initialize
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sparse_ops import largest

# The default number of tokens of an initialization from data.
_TOKENS = 16_384


class RandomTopK:
    """A random projection of centered, scaled tokens of which each token keeps its k largest values, if positive.

    Args:
        mean_D: Mean of the tokens.
        scale: Root of their mean variance per channel.
        latents: Width F.
        k: Values kept per token.
        seed: Draws the projection, entries N(0, 1/D).
    """

    def __init__(self, mean_D: Tensor, scale: float, latents: int, k: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights_FD = torch.randn(latents, len(mean_D), generator=generator) / math.sqrt(len(mean_D))
        self._mean_D = mean_D
        self._weights_FD = weights_FD.to(mean_D) / scale
        self._k = k

    @property
    def latents(self) -> int:
        """Width F of the code."""
        return len(self._weights_FD)

    def encode_sparse(self, x_ND: Tensor) -> Codes:
        """The k largest, where positive."""
        values_Nk, places_Nk = largest((x_ND - self._mean_D) @ self._weights_FD.T, self._k)
        return Codes(values_Nk.relu(), places_Nk)

    def encode(self, x_ND: Tensor) -> Tensor:
        """Dense codes [N, F]."""
        return self.encode_sparse(x_ND).dense(self.latents)


def controls(
    trained: TrainedSae, store: Store, clips: NDArray[np.int64], *, draws: int, seed: int, device: torch.device
) -> dict[Subject, tuple[Encoder, ...]]:
    """`draws` untrained SAEs and as many random projections, as wide and as sparse as `trained`.

    Args:
        trained: What they are to be compared with.
        store: Its moments center and scale the tokens.
        clips: Clips of `store`; the first ones' tokens set what a start takes from data (directions, BatchTopK's
            threshold).
        draws: Of each.
        seed: First of the seeds.
        device: Where to compute.
    """
    moments = store.moments(trained.hook)
    tokens_ND = _first_tokens(store, trained.hook, clips).to(device)
    config: SAEConfig = TypeAdapter(AnySAEConfig).validate_python(trained.recipe)
    k = getattr(config, "k", None) or max(1, round(_mean_l0(trained.coder, tokens_ND)))
    normal = Normalization.from_moments(moments, config.normalization)
    scale = math.sqrt(moments.total_variance / len(moments.mean))
    mean_D = torch.from_numpy(moments.mean).float().to(device)
    untrained = []
    for draw in range(draws):
        # The recipe's own seed is the one that the trained SAE started from.
        sae = SAE(config.model_copy(update={"seed": config.seed + 1 + seed + draw}), normal).to(device)
        initialize(sae, moments, tokens_ND)
        with torch.no_grad():
            sae.train().encode(tokens_ND)
        untrained.append(sae.eval().requires_grad_(False))
    random = tuple(RandomTopK(mean_D, scale, trained.coder.latents, k, seed + draw) for draw in range(draws))
    return {"untrained": tuple(untrained), "random_topk": random}


def _first_tokens(store: Store, hook: str, clips: NDArray[np.int64]) -> Tensor:
    wanted = -(-_TOKENS // store.plan.grid.tokens)
    return torch.cat([read_clip(store, hook, int(clip)).flatten(0, 1) for clip in clips[:wanted]])[:_TOKENS]


def _mean_l0(coder: Encoder, tokens_ND: Tensor) -> float:
    with torch.no_grad():
        return float((coder.encode(tokens_ND) != 0).sum(1, dtype=torch.float64).mean())
