"""Time series of single features, few at a time: the form in which temporal statistics are taken.

    values [C, T, S, F] ─▶ Series: only the rows (clip, patch, feature) that are not all zero, [M, T] in float64

Rows that are all zero add nothing to any sum of products, so sparse codes cost what is active, not F. Rows come in
chunks of at most ROWS: peak memory stays bounded even where every latent is active.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# 2^18 rows of 16 steps in float64 are 32 MiB; a statistic makes about four such arrays.
ROWS = 2**18


@dataclass(frozen=True, eq=False)
class Series:
    """M series of T latent steps.

    Attributes:
        values_MT: float64
        feature_M: int64 Which feature.
        clip_M: int64 Which clip of the window.
        row_M: int64 Which (clip, patch), clip * patches + patch.
    """

    values_MT: Tensor
    feature_M: Tensor
    clip_M: Tensor
    row_M: Tensor


def active_series(values_CTSF: Tensor) -> Iterator[Series]:
    """The series of `values_CTSF` that are not zero throughout."""
    patches = values_CTSF.shape[2]
    # Clip by clip: the mask and its indices stay as small as one clip's.
    for clip, values_TSF in enumerate(values_CTSF):
        patch_M, feature_M = (values_TSF != 0).any(0).nonzero(as_tuple=True)
        for start in range(0, len(patch_M), ROWS):
            patch, feature = patch_M[start : start + ROWS], feature_M[start : start + ROWS]
            values_MT = values_TSF[:, patch, feature].T.double()
            yield Series(values_MT, feature, torch.full_like(patch, clip), clip * patches + patch)


def shuffled_steps(clips: NDArray[np.int64], valid_CT: Tensor, *, seed: int, draw: int) -> Tensor:
    """int64 [C, T]: each clip's steps in random order, the same for all its patches and features.

    Only valid steps change places, so the pairs that are masked stay the same ones. A clip's order depends on (seed,
    draw, clip) alone, not on the window it came in.
    """
    valid = valid_CT.cpu().numpy()
    order_CT = np.tile(np.arange(valid.shape[1]), (len(clips), 1))
    for place, clip in enumerate(clips):
        steps = np.flatnonzero(valid[place])
        order_CT[place, steps] = np.random.default_rng([seed, draw, int(clip)]).permutation(steps)
    return torch.from_numpy(order_CT).to(valid_CT.device)
