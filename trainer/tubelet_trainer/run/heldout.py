"""Reconstruction and sparsity of an SAE on held-out tokens, streamed, accumulated in float64.

FVU = sum ||x - x^||^2 / sum ||x - mean||^2 of raw tokens, with the *vector* mean of the evaluated ones. After whitening
that is not the FVU in normalized space, which is what training minimizes and logs: there small directions count as much
as large ones. The denominator is sum ||x||^2 - ||sum x||^2 / N, with x counted from the mean that the normalization
subtracts (where it centers), so that the difference loses no digits.
"""

from __future__ import annotations

import math

import torch

from tubelet_trainer.data.streams import Stream
from tubelet_trainer.sae.model import SAE


@torch.no_grad()
def evaluate(sae: SAE, windows: Stream, hook: str | None = None) -> dict[str, float]:
    """`fvu`, `l0`, `dead` (share of latents that never fired over these tokens) and `tokens`.

    The FVU is not a number where the tokens do not differ.

    Args:
        sae: On the windows' device. Left in the mode it was in.
        windows: Served from their first batch to their last.
        hook: Whose tokens; None: the first (or only) one's.
    """
    training = sae.training
    sae.eval()
    windows.step = 0
    error = square = torch.zeros((), dtype=torch.float64, device=windows.device)
    total_D = torch.zeros(sae.channels, dtype=torch.float64, device=windows.device)
    active = torch.zeros((), dtype=torch.int64, device=windows.device)
    fired_F = torch.zeros(sae.latents, dtype=torch.bool, device=windows.device)
    for batch in windows:
        x_BD = sae.normalization(batch.tokens if hook is None else batch.hooks[hook])
        codes = sae.activate(x_BD, sae.pre_activations(x_BD))
        residual_BD = sae.normalization.raw_difference(x_BD - sae.reconstruct(codes))
        centered_BD = sae.normalization.raw_difference(x_BD).double()
        error = error + residual_BD.double().square().sum()
        square = square + centered_BD.square().sum()
        total_D += centered_BD.sum(dim=0)
        active += (codes.values != 0).sum()
        fired_F |= codes.fired(sae.latents)
    sae.train(training)
    tokens = windows.total_tokens
    spread = square - total_D.square().sum() / tokens
    return {
        "fvu": float(error / spread) if tokens > 1 and spread > 0 else math.nan,
        "l0": float(active) / tokens,
        "dead": 1 - float(fired_F.double().mean()),
        "tokens": tokens,
    }
