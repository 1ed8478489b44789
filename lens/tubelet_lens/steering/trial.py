"""One clip run through the backbone as it is, with an edit, and with each control of the edit.

edit                what was asked for
matched latents     the same operations on other latents, about as active in the same part of the clip
random directions   steps as long as the edit's on every token, along one random direction
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.stats.ablation_curve import matched_set
from tubelet_lens.steering.latent_edits import Edit, LatentEdits, RandomDirection
from tubelet_lens.steering.latent_usage import Usage
from tubelet_lens.steering.readout import Readout
from tubelet_pipeline.backbones import Backbone, rewriting
from tubelet_pipeline.backbones.rewrite import Rewrite
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the backbone makes of a clip.

    Attributes:
        tokens: float32 [T', S, D] by hook.
        logits_C: float32 on the CPU; [0] without a readout.
    """

    tokens: dict[str, Tensor]
    logits_C: Tensor


def outcome(
    backbone: Backbone,
    hook: str,
    rewrite: Rewrite | None,
    pixels: Tensor,
    hooks: Sequence[str],
    readout: Readout | None,
) -> Outcome:
    """Run one clip `pixels` [T, 3, h, w] with `rewrite` at `hook` (None: as it is), listening at `hooks`."""
    with nullcontext() if rewrite is None else rewriting(backbone, hook, rewrite):
        captured = backbone.activations(pixels[None], hooks)
        logits = torch.empty(0) if readout is None else readout.logits(pixels[None])[0].cpu()
    return Outcome({name: found.tokens[0].float() for name, found in captured.items()}, logits)


def relative_change(before: Tensor, after: Tensor) -> float:
    """||x' - x|| / ||x|| over all tokens of a clip, [T', S, D] each."""
    return float((after - before).double().norm() / before.double().norm())


def matched_edits(
    sae: SAE,
    edits: Sequence[Edit],
    tokens_TSD: Tensor,
    usage: Usage,
    draws: int,
    seed: int,
) -> list[LatentEdits]:
    """`draws` times the same operations on other latents.

    A stand-in is drawn among the 8 latents whose mean activation, on the tokens that its original changes, is nearest
    to the original's; where the original is silent there, means over the store decide.

    Args:
        sae: Whose latents.
        edits: The originals.
        tokens_TSD: The clip at the SAE's hook.
        usage: On the store.
        draws: How many.
        seed: Draws them.
    """
    with torch.no_grad():
        codes_TSF = sae.encode(tokens_TSD.float().flatten(0, 1)).unflatten(0, tokens_TSD.shape[:2])
    largest_F = torch.from_numpy(usage.largest_F)
    originals = np.array(sorted({edit.latent for edit in edits}), dtype=np.int64)
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        stand_in: dict[int, int] = {}
        for edit in edits:
            if edit.latent in stand_in:
                continue
            mean_F = _mean_size(codes_TSF, edit.mask_TS)
            if mean_F[edit.latent] == 0:
                mean_F = usage.mean_F
            usable_F = mean_F > 0
            usable_F[[*originals, *stand_in.values()]] = False
            if not usable_F.any():
                break
            # A latent that never fired is closest to the faintest.
            level_F = np.maximum(mean_F, np.finfo(float).tiny)
            stand_in[edit.latent] = int(matched_set(np.array([edit.latent]), level_F, usable_F, rng)[0])
        if len(stand_in) == len(originals):
            other = [replace(edit, latent=stand_in[edit.latent]) for edit in edits]
            found.append(LatentEdits(sae, other, largest_F))
    return found


def _mean_size(codes_TSF: Tensor, mask_TS: Tensor | None) -> NDArray[np.float64]:
    inside_NF = codes_TSF.flatten(0, 1) if mask_TS is None else codes_TSF[mask_TS.to(codes_TSF.device)]
    mean_F: NDArray[np.float64] = inside_NF.abs().mean(0, dtype=torch.float64).cpu().numpy()
    return mean_F


def random_directions(edits: LatentEdits, draws: int, seed: int) -> list[RandomDirection]:
    """`draws` controls of the same step length."""
    return [RandomDirection(edits, seed=seed * 1_000_003 + draw) for draw in range(draws)]
