"""Controls of an edit: what other latents and random directions do in its place.

matched latents     the same operations on other latents of similar activity in the same part of the clip
random directions   steps of the edit's length on every token, along one random direction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.stats.ablation_curve import matched_set
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_store.reader import Store
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class LatentUsage:
    """How latents fire on some clips of a store. Arrays are float64 [F].

    Attributes:
        largest_F: Largest activation; 0 for a latent that never fired.
        mean_F: Mean |f| over all tokens, inactive ones included.
        frequency_F: Share of tokens with f != 0.
        tokens: Number of tokens.
    """

    largest_F: NDArray[np.float64]
    mean_F: NDArray[np.float64]
    frequency_F: NDArray[np.float64]
    tokens: int


def measure_usage(
    store: Store, hook: str, sae: SparseCoder, clips: NDArray[np.int64], device: torch.device
) -> LatentUsage:
    """Usage of the latents of `sae` on `clips` of a local `store`."""
    largest_F = torch.zeros(sae.latents, device=device)
    size_F = torch.zeros(sae.latents, dtype=torch.float64, device=device)
    fired_F = torch.zeros(sae.latents, dtype=torch.int64, device=device)
    tokens = 0
    for clip in clips:
        with torch.no_grad():
            codes_NF = sae.encode(read_clip(store, hook, int(clip)).to(device).flatten(0, 1))
        largest_F = torch.maximum(largest_F, codes_NF.amax(0))
        size_F += codes_NF.abs().sum(0, dtype=torch.float64)
        fired_F += (codes_NF != 0).sum(0)
        tokens += len(codes_NF)
    counted = max(tokens, 1)
    return LatentUsage(
        largest_F=largest_F.double().cpu().numpy(),
        mean_F=(size_F / counted).cpu().numpy(),
        frequency_F=(fired_F.double() / counted).cpu().numpy(),
        tokens=tokens,
    )


class RandomDirection:
    """A control of edits: on each token a step of their length, along one random direction.

    Args:
        edits: The edits to control for.
        seed: Seed of the direction, which is uniform on the sphere of raw activations.
    """

    def __init__(self, edits: LatentEdits, seed: int) -> None:
        self._edits = edits
        self._generator = torch.Generator().manual_seed(seed)
        self._unit_D: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """New tokens [B, T', S, D]."""
        if self._unit_D is None:
            drawn_D = torch.randn(tokens.shape[-1], generator=self._generator).to(tokens.device)
            self._unit_D = drawn_D / drawn_D.norm()
        length = self._edits.step(tokens).delta.norm(dim=-1, keepdim=True)
        return (tokens.float() + length * self._unit_D).to(tokens.dtype)


def random_directions(edits: LatentEdits, draws: int, seed: int) -> list[RandomDirection]:
    """`draws` controls with steps of the same length as those of `edits`."""
    return [RandomDirection(edits, seed=seed * 1_000_003 + draw) for draw in range(draws)]


def matched_edits(
    sae: SAE,
    edits: Sequence[Edit],
    tokens_TSD: Tensor,
    usage: LatentUsage,
    draws: int,
    seed: int,
) -> list[LatentEdits]:
    """`draws` times the same operations on other latents; fewer where not enough other latents are active.

    A replacement is drawn from the 8 latents whose mean activation, on the tokens that the original changes, is nearest
    to the original's. Where the original is silent there, means over the store are compared instead.

    Args:
        sae: Its latents are edited.
        edits: The originals.
        tokens_TSD: The clip at the SAE's hook.
        usage: On the store.
        draws: Number of controls.
        seed: Seed of the draws.
    """
    with torch.no_grad():
        codes_TSF = sae.encode(tokens_TSD.float().flatten(0, 1)).unflatten(0, tokens_TSD.shape[:2])
    largest_F = torch.from_numpy(usage.largest_F)
    originals = np.array(sorted({edit.latent for edit in edits}), dtype=np.int64)
    rng, controls = np.random.default_rng(seed), []
    for _ in range(draws):
        replacement: dict[int, int] = {}
        for edit in edits:
            if edit.latent in replacement:
                continue
            mean_F = _mean_size(codes_TSF, edit.mask_TS)
            if mean_F[edit.latent] == 0:
                mean_F = usage.mean_F
            usable_F = mean_F > 0
            usable_F[[*originals, *replacement.values()]] = False
            if not usable_F.any():
                break
            # A latent that never fired is closest to the faintest.
            level_F = np.maximum(mean_F, np.finfo(float).tiny)
            replacement[edit.latent] = int(matched_set(np.array([edit.latent]), level_F, usable_F, rng)[0])
        if len(replacement) == len(originals):
            others = [replace(edit, latent=replacement[edit.latent]) for edit in edits]
            controls.append(LatentEdits(sae, others, largest_F))
    return controls


def _mean_size(codes_TSF: Tensor, mask_TS: Tensor | None) -> NDArray[np.float64]:
    inside_NF = codes_TSF.flatten(0, 1) if mask_TS is None else codes_TSF[mask_TS.to(codes_TSF.device)]
    mean_F: NDArray[np.float64] = inside_NF.abs().mean(0, dtype=torch.float64).cpu().numpy()
    return mean_F
