"""Collinearity of the dictionary: do latents share directions?

Each alive latent's largest |cosine| to another, against random directions of the same number and dimension: the more
latents there are in a space, the nearer the nearest of them is by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.codes.dictionary import directions, effective_rank, nearest_latents, random_directions
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Figure, Line, Section, Subject

_NEAR = 0.9
_BINS = 40

_LARGEST = "Of each latent the largest |cosine| between its direction and another's ({whose})."

FIGURES = FigureTable(
    "collinearity",
    FigureSpec(
        "mean",
        "Largest |cosine| to another latent, mean",
        _LARGEST,
        n_of="{of}",
        better="low",
        null="collinearity.mean.random",
        name="collinearity.mean{suffix}",
    ),
    FigureSpec(
        "p95",
        "Largest |cosine| to another latent, 95% quantile",
        _LARGEST,
        n_of="{of}",
        better="low",
        null="collinearity.p95.random",
        name="collinearity.p95{suffix}",
    ),
    FigureSpec(
        "above_09",
        f"Latents with another above {_NEAR}",
        f"Share of latents whose largest |cosine| to another is above {_NEAR} ({{whose}}).",
        n_of="{of}",
        style="percent",
        better="low",
        null="collinearity.above_09.random",
        name="collinearity.above_09{suffix}",
    ),
    FigureSpec(
        "effective_rank",
        "Effective rank of the dictionary",
        "exp of the entropy of the singular values of the unit directions, as shares of their sum (Roy & Vetterli "
        "2007): how many dimensions the directions fill ({whose}).",
        n_of="{of}",
        better="high",
        null="collinearity.effective_rank.random",
        name="collinearity.effective_rank{suffix}",
    ),
)


def measure_collinearity(clips: ClipSetting) -> ClipResult | None:
    """How near the alive latents' directions are to each other; None for fewer than two alive latents."""
    codes = clips.test.pooled["sae"]
    alive_F = codes.max_NF.max(0) > 0
    if codes.negative is not None:
        alive_F |= codes.negative.max_NF.max(0) > 0
    alive = int(alive_F.sum())
    if alive < 2:
        return None
    rows_FD = directions(clips.sae)
    random_AD = random_directions(alive, rows_FD.shape[1], clips.config.seed).to(rows_FD.device)
    nearest = nearest_latents(rows_FD, 1, alive_F)
    cosine_F = nearest.cosines_Fk[:, 0]
    sizes = {"sae": np.abs(cosine_F[alive_F]), "random": np.abs(nearest_latents(random_AD, 1).cosines_Fk[:, 0])}
    ranks = {"sae": effective_rank(rows_FD[alive_F.nonzero()[0]]), "random": effective_rank(random_AD)}
    section = Section(
        name="collinearity",
        title="Directions of the dictionary",
        lead="Do latents share directions? Nearly equal ones are redundant. Random directions show how near "
        "chance alone brings them.",
        figures=(
            *(figure for subject in ("sae", "random") for figure in _figures(subject, sizes[subject], ranks[subject])),
        ),
        curves=(_curve(sizes),),
    )
    what = (
        "of the alive latent (fired on an evaluated clip) whose direction has the largest |cosine| to this one's; "
        "undefined for dead latents."
    )
    latent_F = nearest.latents_Fk[:, 0].astype(np.float64)
    latent_F[~alive_F] = np.nan
    return ClipResult(
        section,
        (
            LatentColumn("nearest_latent", latent_F, f"Number {what}"),
            LatentColumn("nearest_cosine", cosine_F, f"Cosine {what}"),
        ),
    )


def _figures(subject: Subject, sizes_A: NDArray[np.float64], rank: float) -> tuple[Figure, ...]:
    words: dict[str, Any] = {
        "suffix": "" if subject == "sae" else f".{subject}",
        "of": "alive latents" if subject == "sae" else "directions",
        "whose": "alive latents (fired on an evaluated clip) and their directions in raw units"
        if subject == "sae"
        else "null: as many random directions of as many dimensions, one draw",
    }
    values = {
        "mean": float(sizes_A.mean()),
        "p95": float(np.quantile(sizes_A, 0.95)),
        "above_09": float((sizes_A > _NEAR).mean()),
        "effective_rank": rank,
    }
    return tuple(FIGURES.fill(key, value, len(sizes_A), subject=subject, **words) for key, value in values.items())


def _curve(sizes: dict[str, NDArray[np.float64]]) -> Curve:
    edges = np.linspace(0, 1, _BINS + 1)
    lines = []
    for subject, label in (("sae", "SAE"), ("random", "random directions")):
        # Rounding may take a cosine past 1, out of the last bin.
        counts, _ = np.histogram(np.minimum(sizes[subject], 1), bins=edges)
        share = tuple(float(count) for count in counts / len(sizes[subject]))
        lines.append(Line(label=label, subject=subject, y=share))
    return Curve(
        name="collinearity.distribution",
        title="How near the nearest latent is",
        x_label="largest |cosine| to another latent",
        y_label="share of latents",
        x=tuple(float(value) for value in (edges[:-1] + edges[1:]) / 2),
        lines=tuple(lines),
        definition=f"Share of alive latents in each of {_BINS} bins of the largest |cosine| to another, and of as many "
        "random directions.",
    )
