"""Which videos are held out of training, decided per video: all clips of a video are on the same side.

The decision is a hash of the video's id, not its place in the store: a video is on the same side in every store of the
same data set, for any backbone and any number of failed clips.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tubelet_trainer.config import HoldoutConfig


def held_out(video_ids: Sequence[str], config: HoldoutConfig) -> NDArray[np.bool_]:
    """Which clips belong to held-out videos.

    Args:
        video_ids: [clips] Video of each clip.
        config: Share and seed. With a share above 0 and at least two videos, at least one video is held out.

    Returns:
        bool [clips].
    """
    if config.fraction == 0:
        return np.zeros(len(video_ids), dtype=bool)
    unique, inverse = np.unique(np.asarray(video_ids, dtype=object).astype(str), return_inverse=True)
    draws = np.array([_uniform(video, config.seed) for video in unique])
    out = draws < config.fraction
    if not out.any() and len(unique) > 1:
        out[np.argmin(draws)] = True
    return np.asarray(out[inverse])


def _uniform(video: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{video}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
