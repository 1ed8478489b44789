"""How much of a token's code survives one step of time: cosine, support Jaccard, flip rate (science note 1.4 c)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tubelet_lens.section import ratio
from tubelet_lens.series import Series


class StepStability:
    """Comparison of each token's code with the code of the same patch one step later."""

    def __init__(self) -> None:
        self._cosine = self._jaccard = self._flip = 0.0
        self.cosine_pairs = 0
        """Pairs in which both codes are not zero."""
        self.jaccard_pairs = 0
        """Pairs in which at least one code is not zero."""
        self.flip_pairs = 0
        """Pairs in which the earlier code is not zero."""

    def add(self, window_series: Iterable[Series], valid_CT: Tensor, patches: int) -> None:
        """Add the pairs of a window, given all its series."""
        clips, steps = valid_CT.shape
        rows = clips * patches
        squares_RT = torch.zeros(rows, steps, dtype=torch.float64, device=valid_CT.device)
        size_RT = torch.zeros_like(squares_RT)
        dot_RT, common_RT = torch.zeros_like(squares_RT[:, 1:]), torch.zeros_like(squares_RT[:, 1:])
        for series in window_series:
            values_MT = series.values_MT
            active_MT = (values_MT != 0).double()
            squares_RT.index_add_(0, series.row_M, values_MT.square())
            size_RT.index_add_(0, series.row_M, active_MT)
            dot_RT.index_add_(0, series.row_M, values_MT[:, :-1] * values_MT[:, 1:])
            common_RT.index_add_(0, series.row_M, active_MT[:, :-1] * active_MT[:, 1:])
        pair_RT = (valid_CT[:, :-1] & valid_CT[:, 1:]).repeat_interleave(patches, 0)
        early, late = size_RT[:, :-1], size_RT[:, 1:]

        both = pair_RT & (early > 0) & (late > 0)
        norms = (squares_RT[:, :-1] * squares_RT[:, 1:]).sqrt()
        self._cosine += float((dot_RT[both] / norms[both]).sum())
        self.cosine_pairs += int(both.sum())

        either = pair_RT & (early + late > 0)
        union = early + late - common_RT
        self._jaccard += float((common_RT[either] / union[either]).sum())
        self.jaccard_pairs += int(either.sum())

        before = pair_RT & (early > 0)
        self._flip += float((1 - common_RT[before] / early[before]).sum())
        self.flip_pairs += int(before.sum())

    @property
    def cosine(self) -> float | None:
        """Mean cosine of a token's vector and its successor's."""
        return ratio(self._cosine, self.cosine_pairs)

    @property
    def jaccard(self) -> float | None:
        """Mean of |S_t & S_t+1| / |S_t | S_t+1| over the sets S of active latents."""
        return ratio(self._jaccard, self.jaccard_pairs)

    @property
    def flip_rate(self) -> float | None:
        """Mean of 1 - |S_t & S_t+1| / |S_t|."""
        return ratio(self._flip, self.flip_pairs)
