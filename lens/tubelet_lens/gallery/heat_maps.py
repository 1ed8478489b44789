"""Heat-maps: where and when a latent fires in the clips on its page.

(latent, clip) pairs ─▶ windows over those clips alone ─▶ uint8 [T, S] per pair ─▶ text for the page

0: does not fire. 1 to 255: share of the latent's largest activation, rounded up so that faint activations stay visible.
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
    """Collects the heat-maps of (latent, clip) pairs from windows.

    Args:
        wanted: Clips by latent.
        scale: Activation that becomes 255, by latent.
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
        """Add one window."""
        for clip, codes_TSF in zip(window.clips.tolist(), window.codes_CTSF, strict=True):
            latents = self._latents_of.get(clip, [])
            scale_L = torch.tensor([self._scale[latent] for latent in latents], device=codes_TSF.device)
            chosen_TSL = codes_TSF[:, :, torch.tensor(latents, device=codes_TSF.device)].abs() / scale_L
            levels = (chosen_TSL * _LEVELS).ceil().clamp_(0, _LEVELS).to(torch.uint8).cpu().numpy()
            for place, latent in enumerate(latents):
                self.maps[latent, clip] = levels[:, :, place]


def packed(levels: NDArray[np.uint8]) -> str:
    """Base64 of (gap, level) byte pairs, one for each nonzero level.

    The gap is the number of zeros since the previous pair; a pair (255, 0) encodes 256 zeros.
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
