"""How much of the activation the SAE reconstructs: FVU, explained variance, cosine.

One pass: with c the store's mean (any constant will do; a near mean avoids cancellation), E = sum ||x - xhat||^2,
S = sum (x - c), Q = sum ||x - c||^2 and N tokens give the total sum of squares about the evaluation mean,
SST = Q - ||S||^2 / N.
"""

from __future__ import annotations

import torch

from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.metrics.metric import Setting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Section, ratio

FIGURES = FigureTable(
    "reconstruction",
    FigureSpec(
        "fvu",
        "FVU (fraction of variance unexplained)",
        "sum ||x - x̂||² / sum ||x - x̄||² over all evaluated tokens, where x̄ is the mean vector of those tokens. "
        "0: perfect; 1: no better than always predicting the mean; undefined if x is constant.",
        n_of="tokens",
        better="low",
        headline=True,
        null="exact: always predicting the mean gives 1",
    ),
    FigureSpec(
        "explained_variance", "Explained variance", "1 - FVU, with the FVU above.", n_of="tokens", better="high"
    ),
    FigureSpec(
        "sample_fvu",
        "Mean per-token FVU",
        "Mean over tokens of ||x - x̂||² / ||x - c||², where c is the mean vector of the whole store. Every token has "
        "the same weight, so tokens near the mean weigh more than in the FVU: never compare the two. Tokens equal to c "
        "are left out.",
        n_of="tokens",
        better="low",
    ),
    FigureSpec(
        "cosine",
        "Cosine of x and x̂",
        "Mean over tokens of x·x̂ / (||x|| ||x̂||), without subtracting a mean: a large common mean raises it. A zero "
        "vector counts as 0.",
        n_of="tokens",
        better="high",
    ),
)

_TINY = 1e-30


class Reconstruction:
    """Metric: fraction of variance unexplained and related figures."""

    def __init__(self, setting: Setting) -> None:
        mean = setting.store.moments(setting.hook).mean
        self._center_D = torch.from_numpy(mean).to(setting.device)
        self._sum_D = torch.zeros_like(self._center_D)
        self._squares = 0.0
        self._error = 0.0
        self._sample_fvu = 0.0
        self._samples = 0
        self._cosine = 0.0
        self._tokens = 0

    def add(self, window: Window) -> None:
        """Add the clips of one window."""
        for x_TSD, xhat_TSD in zip(window.x_CTSD, window.xhat_CTSD, strict=True):
            x_ND, xhat_ND = x_TSD.flatten(0, 1).double(), xhat_TSD.flatten(0, 1).double()
            centered_ND = x_ND - self._center_D
            error_N = (x_ND - xhat_ND).square().sum(1)
            squares_N = centered_ND.square().sum(1)
            self._sum_D += centered_ND.sum(0)
            self._squares += float(squares_N.sum())
            self._error += float(error_N.sum())
            varied_N = squares_N > 0
            self._sample_fvu += float((error_N[varied_N] / squares_N[varied_N]).sum())
            self._samples += int(varied_N.sum())
            norms_N = x_ND.norm(dim=1) * xhat_ND.norm(dim=1)
            self._cosine += float(((x_ND * xhat_ND).sum(1) / norms_N.clamp_min(_TINY)).sum())
            self._tokens += len(x_ND)

    def section(self) -> Section:
        """Figures over all tokens added."""
        tokens = self._tokens
        total = self._squares - float(self._sum_D.square().sum()) / max(tokens, 1)
        fvu = ratio(self._error, total)
        return Section(
            name="reconstruction",
            title="Reconstruction",
            lead="How much of the backbone's activation the code keeps. Always predicting the mean vector has FVU 1.",
            figures=(
                FIGURES.fill("fvu", fvu, tokens),
                FIGURES.fill("explained_variance", None if fvu is None else 1.0 - fvu, tokens),
                FIGURES.fill("sample_fvu", ratio(self._sample_fvu, self._samples), self._samples),
                FIGURES.fill("cosine", ratio(self._cosine, tokens), tokens),
            ),
        )

    def latents(self) -> tuple[LatentColumn, ...]:
        """None: reconstruction is measured per token."""
        return ()
