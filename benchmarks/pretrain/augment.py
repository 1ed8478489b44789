"""Clips cut out of the corpus, each changed in ways that no motion depends on, and in ways that turn one into another.

Turning, mirroring and playing backwards make other actions of the same kind, so the model learns them all; colors,
brightness and noise say nothing about the action. No label is read.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

STRIDES = (3, 3, 2)
"""Drawn from evenly. The demo samples every third frame, which covers a whole video; every second one is for those who
sample otherwise."""

NOISE = 0.008
"""Largest standard deviation of the noise, pixels in 0..1. What the codec leaves of the generator's is 0.004."""


def draw_clips(
    corpus: NDArray[np.uint8], rows: NDArray[np.int64], frames: int, rng: np.random.Generator
) -> torch.Tensor:
    """One augmented clip from each of `rows` of the corpus.

    Args:
        corpus: uint8 [video, F, 3, H, W] with H = W.
        rows: int64 [B].
        frames: Frames per clip, T.
        rng: Every choice comes from it.

    Returns:
        float32 [B, T, 3, H, W] in 0..1.
    """
    return torch.stack([_augment(corpus[row], frames, rng) for row in rows])


def _augment(video: NDArray[np.uint8], frames: int, rng: np.random.Generator) -> torch.Tensor:
    stride = int(rng.choice(STRIDES))
    start = int(rng.integers(len(video) - (frames - 1) * stride))
    clip = video[start : start + (frames - 1) * stride + 1 : stride]
    if rng.random() < 0.5:
        clip = clip[::-1]
    if rng.random() < 0.5:
        clip = clip[..., ::-1]
    clip = np.rot90(clip, int(rng.integers(4)), axes=(-2, -1))
    if rng.random() < 0.5:
        clip = clip[:, rng.permutation(3)]
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).float() / 255
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.08, 0.08)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * rng.uniform(0, NOISE)
    return ((pixels - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)
