"""How each latent was used on some clips of a store: what edits need to know before they start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_store.reader import Store


@dataclass(frozen=True, eq=False)
class Usage:
    """Attributes, all float64 [F].

    Attributes:
        largest_F: Largest activation; 0 of a latent that never fired.
        mean_F: Mean size |f| over tokens, those with f = 0 included.
        frequency_F: Share of tokens with f != 0.
        tokens: How many tokens were looked at.
    """

    largest_F: NDArray[np.float64]
    mean_F: NDArray[np.float64]
    frequency_F: NDArray[np.float64]
    tokens: int

    @property
    def alive_F(self) -> NDArray[np.bool_]:
        """bool [F] Latents that fired."""
        return self.frequency_F > 0


def usage(store: Store, hook: str, sae: SparseCoder, clips: NDArray[np.int64], device: torch.device) -> Usage:
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
    return Usage(
        largest_F=largest_F.double().cpu().numpy(),
        mean_F=(size_F / counted).cpu().numpy(),
        frequency_F=(fired_F.double() / counted).cpu().numpy(),
        tokens=tokens,
    )
