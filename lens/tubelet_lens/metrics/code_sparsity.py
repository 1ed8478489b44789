"""How sparse the code is, and how much of the dictionary is in use: L0, dead latents, densities."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.metrics.metric import Setting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Line, Section, ratio

_QUANTILES = (0.05, 0.5, 0.95)

# A latent that fires on more than half of all tokens says little about any of them, and makes any code look coherent.
_ALWAYS_ON = 0.5

_BINS_PER_DECADE = 4

FIGURES = FigureTable(
    "sparsity",
    FigureSpec(
        "l0",
        "L0 (active latents per token)",
        "Mean over tokens of the number of latents whose code is not exactly 0. It can be below a TopK's k where fewer "
        "than k latents are positive.",
        n_of="tokens",
        headline=True,
        null="exact: a count; it is a cost to read together with FVU, and has no null",
    ),
    FigureSpec(
        "l0_quantile",
        "L0, {words}",
        "Smallest number of active latents that at least {percent}% of the tokens do not exceed.",
        n_of="tokens",
        name="sparsity.l0_p{percent:02d}",
    ),
    FigureSpec(
        "dead_fraction",
        "Dead latents",
        "Fraction of latents that fired on none of the {tokens} evaluated tokens. On fewer tokens more latents appear "
        "dead: compare only at equal numbers of tokens. The training log counts differently: latents silent for a "
        "number of training tokens, or on its own, fewer, held-out tokens.",
        n_of="latents",
        style="percent",
        better="low",
        headline=True,
        null="exact: 0 is the best value",
    ),
    FigureSpec(
        "dead", "Dead latents, number", "The same as a number of latents.", n_of="latents", style="count", better="low"
    ),
    FigureSpec(
        "always_on",
        "Latents on more than half of the tokens",
        f"Number of latents with density above {_ALWAYS_ON}. A few always-on latents make any code look coherent "
        "through time: read temporal coherence together with this.",
        n_of="latents",
        style="count",
        better="low",
    ),
    FigureSpec(
        "median_density",
        "Median density of alive latents",
        "Density of a latent = fraction of evaluated tokens on which it fires.",
        n_of="alive latents",
    ),
)


class Sparsity:
    """Metric: active latents per token, and tokens per latent."""

    def __init__(self, setting: Setting) -> None:
        self._fired_F = torch.zeros(setting.latents, dtype=torch.int64, device=setting.device)
        self._sum_F = torch.zeros(setting.latents, dtype=torch.float64, device=setting.device)
        self._largest_F = torch.zeros(setting.latents, dtype=torch.float32, device=setting.device)
        # Tokens by number of active latents, 0 ... F: quantiles are exact.
        self._tokens_by_L0 = torch.zeros(setting.latents + 1, dtype=torch.int64, device=setting.device)

    def add(self, window: Window) -> None:
        """Add the clips of one window."""
        latents = len(self._fired_F)
        for codes in window.codes:
            tokens = codes.shape[0] * codes.shape[1]
            size_E = codes.value_E.abs()
            self._fired_F += codes.latent_E.bincount(minlength=latents)
            self._sum_F += codes.latent_E.bincount(size_E.double(), minlength=latents)
            self._largest_F.scatter_reduce_(0, codes.latent_E, size_E, "amax")
            active_N = codes.token_E.bincount(minlength=tokens)
            self._tokens_by_L0 += active_N.bincount(minlength=len(self._tokens_by_L0))

    def section(self) -> Section:
        """Figures over all tokens added."""
        by_L0 = self._tokens_by_L0.cpu().numpy()
        fired_F = self._fired_F.cpu().numpy()
        tokens, latents = int(by_L0.sum()), len(fired_F)
        density_F = fired_F / max(tokens, 1)
        dead, always_on = int((fired_F == 0).sum()), int((density_F > _ALWAYS_ON).sum())
        alive_density = density_F[fired_F > 0]
        median_density = float(np.median(alive_density)) if len(alive_density) else None
        return Section(
            name="sparsity",
            title="Sparsity",
            lead="How many latents are active per token, and how many of the dictionary's latents are ever active.",
            figures=(
                FIGURES.fill("l0", ratio(float((by_L0 * np.arange(len(by_L0))).sum()), tokens), tokens),
                *(
                    FIGURES.fill(
                        "l0_quantile",
                        _quantile(by_L0, level),
                        tokens,
                        percent=round(100 * level),
                        words="median" if level == 0.5 else f"{level:.0%} quantile",
                    )
                    for level in _QUANTILES
                ),
                FIGURES.fill("dead_fraction", ratio(dead, latents), latents, tokens=f"{tokens:,}"),
                FIGURES.fill("dead", dead, latents),
                FIGURES.fill("always_on", always_on, latents),
                FIGURES.fill("median_density", median_density, len(alive_density)),
            ),
            curves=(_density_histogram(alive_density, tokens, dead),) if len(alive_density) else (),
        )

    def latents(self) -> tuple[LatentColumn, ...]:
        """Frequency and size of every latent."""
        fired_F = self._fired_F.cpu().double()
        tokens = int(self._tokens_by_L0.sum())
        where = f"the {tokens:,} evaluated tokens"
        return (
            LatentColumn("frequency", (fired_F / tokens).numpy(), f"Fraction of {where} on which the latent fires."),
            LatentColumn(
                "mean_activation",
                (self._sum_F.cpu() / fired_F).numpy(),
                f"Mean size of the code over those of {where} on which it fires; undefined where it never does.",
            ),
            LatentColumn("max_activation", self._largest_F.cpu().double().numpy(), f"Largest code over {where}."),
        )


def _quantile(tokens_by_L0: NDArray[np.int64], level: float) -> float | None:
    tokens = tokens_by_L0.sum()
    if not tokens:
        return None
    return float(np.searchsorted(np.cumsum(tokens_by_L0), level * tokens))


def _density_histogram(alive_density: NDArray[np.float64], tokens: int, dead: int) -> Curve:
    lowest = int(np.floor(np.log10(1 / tokens)))
    edges = np.linspace(lowest, 0, -lowest * _BINS_PER_DECADE + 1) if lowest else np.array([-1.0, 0.0])
    counts, _ = np.histogram(np.log10(alive_density), bins=edges)
    return Curve(
        name="sparsity.density",
        title="How often latents fire",
        kind="bars",
        x_label="log10 of density",
        y_label="latents",
        x=tuple(float(edge) for edge in edges),
        lines=(Line(label="latents", y=tuple(float(count) for count in counts)),),
        definition="Histogram of log10(density) over alive latents; density = fraction of evaluated tokens on which a "
        f"latent fires. The left end is one token of {tokens:,}. The {dead:,} dead latents are not shown.",
    )
