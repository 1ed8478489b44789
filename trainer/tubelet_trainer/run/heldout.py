"""Figures of an SAE on held-out tokens, streamed, accumulated in float64.

FVU = sum ||x - x^||^2 / sum ||x - mean||^2 of raw tokens, with the vector mean of the evaluated tokens. With whitening
this differs from the FVU in normalized space, which training minimizes and logs: there small directions count as much
as large ones. The denominator is sum ||x||^2 - ||sum x||^2 / N, with x measured from the mean that the normalization
subtracts (where it centers), so that the difference loses no digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tubelet_trainer.data.streams import Stream
from tubelet_trainer.process_group import ALONE
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sharded import ShardedSAE


@torch.no_grad()
def evaluate(sae: SAE, loader: Stream, hook: str | None = None) -> dict[str, float]:
    """`fvu`, `l0`, `dead` (share of latents that never fired on these tokens) and `tokens`.

    The FVU is NaN where the tokens do not differ.

    Args:
        sae: On the loader's device. Left in the mode it was in.
        loader: Read from its first batch to its last.
        hook: Hook whose tokens are evaluated; None: the first (or only) one.
    """
    training = sae.training
    sae.eval()
    loader.step = 0
    error = square = torch.zeros((), dtype=torch.float64, device=loader.device)
    total_D = torch.zeros(sae.channels, dtype=torch.float64, device=loader.device)
    active = torch.zeros((), dtype=torch.int64, device=loader.device)
    fired_F = torch.zeros(sae.latents, dtype=torch.bool, device=loader.device)
    for batch in loader:
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
    tokens = loader.total_tokens
    spread = square - total_D.square().sum() / tokens
    return {
        "fvu": float(error / spread) if tokens > 1 and spread > 0 else math.nan,
        "l0": float(active) / tokens,
        "dead": 1 - float(fired_F.double().mean()),
        "tokens": tokens,
    }


@torch.no_grad()
def temporal_coherence(sae: SAE, loader: Stream, hook: str | None = None) -> dict[str, float]:
    """`coherence`: mean cosine between the codes of one patch at successive latent steps; `coherence_other`: the same
    between tokens of different clips, as a control. NaN without a pair.

    Pairs of which one code is all zero are left out (their cosine is undefined), and pairs with repeated frames.

    Args:
        sae: As for `evaluate`; of a split dictionary this process's part, in a collective call.
        loader: Serves temporal pairs.
        hook: As for `evaluate`.
    """
    training, holders = sae.training, sae.ranks if isinstance(sae, ShardedSAE) else ALONE
    sae.eval()
    loader.step = 0
    totals: dict[str, Tensor | float] = {"coherence": 0.0, "coherence_other": 0.0}
    counts: dict[str, Tensor | float] = {"coherence": 0.0, "coherence_other": 0.0}

    def add(name: str, one_AF: Tensor, other_AF: Tensor, valid_A: Tensor) -> None:
        pairings = ((one_AF, other_AF), (one_AF, one_AF), (other_AF, other_AF))
        products = holders.sum(torch.stack([(a * b).sum(1) for a, b in pairings]).double())
        norm_A = (products[1] * products[2]).sqrt()
        counted_A = valid_A & (norm_A > 0)
        totals[name] = totals[name] + torch.where(counted_A, products[0] / norm_A, 0).sum()
        counts[name] = counts[name] + counted_A.sum()

    for batch in loader:
        pairs = batch.temporal
        if pairs is None or not len(pairs):
            continue
        name = next(iter(batch.hooks)) if hook is None else hook
        both = [sae.normalization(tokens) for tokens in (batch.hooks[name][pairs.rows], pairs.hooks[name])]
        anchor_AF, neighbor_AF = (sae.activate(x, sae.pre_activations(x)).dense(sae.latents) for x in both)
        clip_A, half = batch.clip[pairs.rows], len(pairs) // 2
        add("coherence", anchor_AF, neighbor_AF, pairs.valid)
        add("coherence_other", anchor_AF, neighbor_AF.roll(half, 0), clip_A != clip_A.roll(half))
    sae.train(training)
    return {name: float(total) / float(counts[name]) if counts[name] else math.nan for name, total in totals.items()}
