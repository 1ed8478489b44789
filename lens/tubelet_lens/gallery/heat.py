"""Heat-maps: where and when a latent fires in the clips of its page.

(latent, clip) pairs ─▶ windows over those clips alone ─▶ uint8 [T, S] per pair ─▶ text for the page

0 is not firing; 1 to 255 are shares of the latent's largest activation, rounded up, so that whatever fires is seen.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.inputs.clip_stream import Window

_LEVELS = 255
_LONGEST_GAP = 255


class HeatMaps:
    """Takes windows, keeps the maps of the pairs asked for.

    Args:
        wanted: Of each latent its clips.
        scale: Of each latent the size that becomes 255.
    """

    def __init__(self, wanted: Mapping[int, Sequence[int]], scale: Mapping[int, float]) -> None:
        self._latents_of: dict[int, list[int]] = {}
        for latent, clips in wanted.items():
            for clip in clips:
                self._latents_of.setdefault(clip, []).append(latent)
        self._scale = scale
        self.maps: dict[tuple[int, int], NDArray[np.uint8]] = {}
        """uint8 [T, S] by (latent, clip)."""

    @property
    def clips(self) -> NDArray[np.int64]:
        """int64 Clips to stream, ascending."""
        return np.array(sorted(self._latents_of), dtype=np.int64)

    def add(self, window: Window) -> None:
        """Take in one window."""
        for clip, codes_TSF in zip(window.clips.tolist(), window.codes_CTSF, strict=True):
            latents = self._latents_of.get(clip, [])
            scale_L = torch.tensor([self._scale[latent] for latent in latents], device=codes_TSF.device)
            chosen_TSL = codes_TSF[:, :, torch.tensor(latents, device=codes_TSF.device)].abs() / scale_L
            levels = (chosen_TSL * _LEVELS).ceil().clamp_(0, _LEVELS).to(torch.uint8).cpu().numpy()
            for place, latent in enumerate(latents):
                self.maps[latent, clip] = levels[:, :, place]


def packed(levels: NDArray[np.uint8]) -> str:
    """Base64 of (gap, level) bytes, one pair for each level that is not 0.

    A gap counts the zeros since the pair before; 255 zeros and more are bridged by pairs (255, 0), worth 256 zeros.
    """
    return base64.b64encode(bytes(_pairs(levels.reshape(-1)))).decode()


def _pairs(flat: NDArray[np.uint8]) -> Iterator[int]:
    at = np.flatnonzero(flat)
    gaps = np.diff(at, prepend=-1) - 1
    for gap, level in zip(gaps.tolist(), flat[at].tolist(), strict=True):
        while gap >= _LONGEST_GAP + 1:
            yield _LONGEST_GAP
            yield 0
            gap -= _LONGEST_GAP + 1
        yield gap
        yield level
