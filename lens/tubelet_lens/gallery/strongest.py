"""Of each latent the few videos with the largest keys, kept while videos stream by.

    per video: key, peak, clip [F] ─▶ waiting [F, V] ─▶ merged into [F, K] when V is enough

The key is the size of the activation (strongest clips), or the same random number for every latent (a uniform sample of
the videos on which a latent fires: bottom-k sampling, Cohen & Kaplan 2007). Memory is O(F K), whatever the store holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Merging costs a sort of K + this many entries; few videos at a time keep it small.
_WAITING = 32


class Kept:
    """The K videos with the largest keys for each of F latents, largest first; ties go to the video seen first."""

    def __init__(self, latents: int, keep: int, device: torch.device) -> None:
        self._key_FK = torch.full((latents, keep), -torch.inf, device=device)
        self._peak_FK = torch.zeros((latents, keep), device=device)
        self._clip_FK = torch.full((latents, keep), -1, dtype=torch.int32, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, key_F: Tensor, peak_F: Tensor, clip_F: Tensor) -> None:
        """Take in one video.

        Args:
            key_F: float32 What it is ranked by; -inf: not at all.
            peak_F: float32 Its activation of largest size.
            clip_F: int32 The clip of the video that holds it.
        """
        self._waiting.append((key_F, peak_F, clip_F))
        if len(self._waiting) == _WAITING:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, peaks, clips = zip(*self._waiting, strict=True)
        self._waiting = []
        # Those kept stand first and the sort is stable, so that the order does not hang on when it is merged.
        key_FN = torch.cat([self._key_FK, torch.stack(keys, 1)], 1)
        order_FK = key_FN.argsort(dim=1, descending=True, stable=True)[:, : self._key_FK.shape[1]]
        self._key_FK = key_FN.gather(1, order_FK)
        self._peak_FK = torch.cat([self._peak_FK, torch.stack(peaks, 1)], 1).gather(1, order_FK)
        self._clip_FK = torch.cat([self._clip_FK, torch.stack(clips, 1)], 1).gather(1, order_FK)

    def result(self) -> tuple[Tensor, Tensor]:
        """Peaks float32 [F, K] and clips int32 [F, K], -1 where there are fewer; on the CPU."""
        self._merge()
        missing_FK = self._key_FK.isneginf()
        return self._peak_FK.masked_fill(missing_FK, 0.0).cpu(), self._clip_FK.masked_fill(missing_FK, -1).cpu()
