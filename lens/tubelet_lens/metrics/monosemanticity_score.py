"""Monosemanticity: are the clips on which a latent fires alike, by the judgment of another model?

    a~_nj = (a_nj - min_n) / (max_n - min_n)                     activation of latent j on clip n, scaled to 0 ... 1
    s_nm  = cos(e_n, e_m)                                        likeness of two clips
    MS_j  = sum_{n<m} a~_nj a~_mj s_nm / sum_{n<m} a~_nj a~_mj   Pach et al. 2025, arXiv 2504.02821

With ||e_n|| = 1 both sums have a closed form, linear in the number of clips and exact:

    MS_j = ( ||sum_n a~_nj e_n||^2 - sum_n a~_nj^2 ) / ( (sum_n a~_nj)^2 - sum_n a~_nj^2 )

For a clip, a_nj is the largest (default) or mean code over its tokens. [RECON: the paper has images.]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Latents at once: a float64 block of 10^5 clips is then 200 MB.
_LATENTS = 256


def monosemanticity(a_NF: NDArray[np.floating], e_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [F] MS of each latent over N clips, closed form.

    NaN where it is undefined: the latent is constant over the clips (dead among them), or no two clips share weight,
    because a~ is above 0 on one alone.

    Args:
        a_NF: Activations.
        e_NE: Embeddings of norm 1.
    """
    scores = np.full(a_NF.shape[1], np.nan)
    for start in range(0, a_NF.shape[1], _LATENTS):
        a = a_NF[:, start : start + _LATENTS].astype(np.float64)
        low = a.min(0)
        span = a.max(0) - low
        varies = span > 0
        a = (a[:, varies] - low[varies]) / span[varies]
        squares = (a * a).sum(0)
        weight = a.sum(0) ** 2 - squares
        shared = (a > 0).sum(0) > 1
        block = np.full(len(shared), np.nan)
        together = ((a[:, shared].T @ e_NE) ** 2).sum(1)
        block[shared] = (together - squares[shared]) / weight[shared]
        scores[start : start + _LATENTS][varies] = block
    return scores


def mean_cosine(e_NE: NDArray[np.float64]) -> float:
    """Mean cosine of two different clips: the expectation of every MS_j when the clips of a latent are permuted.

    A random permutation gives each pair of places every pair of clips alike, so the weights cancel.
    """
    clips = len(e_NE)
    return float(((e_NE.sum(0) ** 2).sum() - clips) / (clips * (clips - 1)))
