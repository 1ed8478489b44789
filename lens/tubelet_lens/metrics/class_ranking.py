"""Latents ranked by what they mean to a probe of classes: where both ablations, of code and backbone, begin.

fit side but its ranking part ─▶ probe of the pooled codes     ranking part ─▶ importance, activity
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.inputs.labeled_clips import Labeled
from tubelet_lens.metrics.metric import ClipSetting
from tubelet_lens.stats.linear_models import Probe, choose_penalty, fit_probe


@dataclass(frozen=True, eq=False)
class Ranking:
    """A probe, and how much each latent matters to it.

    Attributes:
        known: Clips whose class is known.
        probe: Fitted without the ranking part.
        codes_NF: float32 [N, F] Mean codes of the clips of the ranking part.
        class_N: int64 [N] Their classes.
        importance_CF: float64 [C, F] See `class_ranking.importance`.
        mean_F: float64 [F] Mean size of each latent's activation on the ranking part.
    """

    known: Labeled
    probe: Probe
    codes_NF: NDArray[np.float32]
    class_N: NDArray[np.int64]
    importance_CF: NDArray[np.float64]
    mean_F: NDArray[np.float64]

    @property
    def alive_F(self) -> NDArray[np.bool_]:
        """bool [F]: fires in the ranking part."""
        return self.mean_F > 0

    @property
    def importance_F(self) -> NDArray[np.float64]:
        """float64 [F] Mean importance over the clips of the ranking part, each for its own class."""
        share_C = np.bincount(self.class_N, minlength=self.known.classes) / len(self.class_N)
        return share_C @ self.importance_CF


def rank_latents(clips: ClipSetting) -> Ranking | None:
    """Fit the probe and rank; None without labels on both sides."""
    known, fit, parts = clips.labeled, clips.fit, clips.parts
    if known is None or fit is None or parts is None:
        return None
    classes = known.classes
    codes_NF = fit.pooled["sae"].mean_NF[known.fit_rows]
    in_ranking, validation = parts.ranking[known.fit_rows], parts.validation[known.fit_rows]
    rest = ~in_ranking
    penalties = clips.config.action.penalties
    penalty = choose_penalty(codes_NF[rest], known.fit_class[rest], validation[rest], classes, penalties)
    probe = fit_probe(codes_NF[rest], known.fit_class[rest], classes, penalty)
    ranking_NF, ranking_class = codes_NF[in_ranking], known.fit_class[in_ranking]
    return Ranking(
        known=known,
        probe=probe,
        codes_NF=ranking_NF,
        class_N=ranking_class,
        importance_CF=importance(probe.weights_CF, ranking_NF, ranking_class),
        mean_F=np.abs(ranking_NF).mean(axis=0, dtype=np.float64),
    )


def importance(
    weights_CF: NDArray[np.float64], codes_NF: NDArray[np.float32], class_N: NDArray[np.int64]
) -> NDArray[np.float64]:
    """I_jc = |w_cj| |E[z_j | c]|, float64 [C, F]: how far logit c of class c's mean clip moves when latent j goes to 0.

    Args:
        weights_CF: Of a linear probe, in units of the pooled codes (not of standardized ones).
        codes_NF: Pooled codes of the ranking part.
        class_N: Their classes, 0 ... C - 1; a class without a clip has importance 0.
    """
    out = np.zeros(weights_CF.shape)
    for number in np.unique(class_N):
        mean_F = codes_NF[class_N == number].mean(axis=0, dtype=np.float64)
        out[number] = np.abs(weights_CF[number] * mean_F)
    return out


def ranked(importance_F: NDArray[np.float64], alive_F: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64 [alive]: latents that are alive, the most important first; equal ones in the dictionary's order."""
    latents = np.flatnonzero(alive_F)
    return latents[np.argsort(-importance_F[latents], kind="stable")]
