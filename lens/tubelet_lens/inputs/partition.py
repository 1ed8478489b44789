"""Parts of the clips that probes and maps are fitted on, apart by video.

train       fitted on while choosing
validation  what is chosen (penalties) is chosen here; then fitted again on everything
ranking     latents are ranked here for ablation, by a probe that was fitted on the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Parts:
    """bool [N] each; every clip is in exactly one."""

    train: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    ranking: NDArray[np.bool_]


def partition(videos: Sequence[str], *, validation: float, ranking: float, seed: int) -> Parts:
    """Share out clips by their videos, at random.

    Args:
        videos: [N] Video of each clip.
        validation: Share of the videos, rounded; at least one of them where there are three or more.
        ranking: The same.
        seed: Draws the videos; depends on their ids, not on the order of the clips.
    """
    names, inverse = np.unique(np.asarray(videos, dtype=object).astype(str), return_inverse=True)
    least = 1 if len(names) >= 3 else 0
    first, second = (max(least, round(share * len(names))) for share in (validation, ranking))
    place = np.empty(len(names), dtype=np.int64)
    place[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names))
    place_N = place[inverse]
    in_validation = place_N < first
    in_ranking = (place_N >= first) & (place_N < first + second)
    return Parts(~in_validation & ~in_ranking, in_validation, in_ranking)
