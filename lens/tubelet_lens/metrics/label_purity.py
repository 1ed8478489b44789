"""Whether single latents represent one label: purity of their strongest videos.

    purity@16 of a latent = share of the commonest label among the 16 videos on which it fires most strongly

[RECON] saev has the name and the 16, scores a latent against a class that is given, and does not treat videos. Chosen
here: the class is the most common label; a video's value is the largest over its clips and their tokens; latents
that fire in fewer than 16 videos have none; the null permutes the labels of the videos. The share of the top label over
all clips (`top_label_share`) is not in saev.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Line, Section

_STRONGEST = 16
_BINS = 16

FIGURES = FigureTable(
    "labels",
    FigureSpec(
        "purity",
        f"Purity of the {_STRONGEST} strongest videos",
        "{how} Mean over the latents.",
        n_of="latents of {latents}",
        style="percent",
        better="high",
        null="labels.purity.permuted",
        name="labels.purity.sae",
    ),
    FigureSpec(
        "purity_permuted",
        f"Purity of the {_STRONGEST} strongest videos",
        "Null: the same with the labels of the test videos permuted; mean, lowest and highest of {draws} draws. The "
        f"commonest of {_STRONGEST} labels drawn at random has a share well above 1 / {{labels}}.",
        n_of="latents of {latents}",
        style="percent",
        interval="lowest and highest of the draws",
        name="labels.purity.permuted",
    ),
    FigureSpec(
        "pure",
        "Latents purer than the null",
        "Share of latents whose purity is above that of 99 % of the latents under permuted labels. By chance it would "
        "be 1 % or less.",
        n_of="latents of {latents}",
        style="percent",
        better="high",
        null="exact: 1 % by construction",
    ),
)


def label_purity(clips: ClipSetting) -> ClipResult | None:
    """Purity, top label and its share for every latent; None where fewer than 16 test videos have a label."""
    test = clips.test
    rows = np.flatnonzero(test.labels >= 0)
    labels, class_N = np.unique(test.labels[rows], return_inverse=True)
    _, first, video_N = np.unique(test.videos[rows].astype(str), return_index=True, return_inverse=True)
    if len(first) < _STRONGEST or len(labels) < 2:
        return None
    pooled = test.pooled["sae"]
    largest_VF = np.zeros((len(first), pooled.max_NF.shape[1]), dtype=np.float32)
    np.maximum.at(largest_VF, video_N, pooled.max_NF[rows])
    class_V = class_N[first]
    purity_F, top_F = _purity(largest_VF, class_V, len(labels))
    rng = np.random.default_rng(clips.config.seed)
    draws = [_purity(largest_VF, rng.permutation(class_V), len(labels))[0] for _ in range(clips.setting.null_draws)]
    mean_NF = pooled.mean_NF
    sums_CF = np.stack([mean_NF[rows[class_N == c]].mean(axis=0, dtype=np.float64) for c in range(len(labels))])
    sums_CF = np.maximum(sums_CF, 0)
    with np.errstate(invalid="ignore"):
        share_F = sums_CF.max(axis=0) / sums_CF.sum(axis=0)
    defined = np.isfinite(purity_F)
    how = (
        f"Share of the commonest label among the {_STRONGEST} test videos on which the latent's largest activation is "
        f"highest; undefined where it fires in fewer than {_STRONGEST} of {len(first):,} videos."
    )
    null, ends = spread([float(np.mean(draw[defined])) for draw in draws] if defined.any() else [])
    purity = float(np.mean(purity_F[defined])) if defined.any() else None
    count, latents = int(defined.sum()), f"{len(purity_F):,}"
    return ClipResult(
        Section(
            name="labels",
            title="Latents and labels",
            lead="Do the videos on which a latent fires most share a label? A latent may represent a color, a place or "
            "a speed instead: a low score here does not make it a bad latent.",
            figures=(
                FIGURES.fill("purity", purity, count, how=how, latents=latents),
                FIGURES.fill(
                    "purity_permuted",
                    null,
                    count,
                    subject="permuted",
                    ends=ends,
                    draws=len(draws),
                    labels=len(labels),
                    latents=latents,
                ),
                FIGURES.fill(
                    "pure",
                    _purer(purity_F[defined], np.stack(draws)[:, defined]) if defined.any() else None,
                    count,
                    latents=latents,
                ),
            ),
            curves=(_histogram(purity_F[defined], np.stack(draws)[:, defined]),) if defined.any() else (),
        ),
        (
            LatentColumn("purity_16", purity_F, how),
            LatentColumn(
                "top_label",
                np.where(defined, labels[top_F].astype(np.float64), np.nan),
                f"The commonest label among those {_STRONGEST} videos; of equals the lowest number.",
            ),
            LatentColumn(
                "top_label_share",
                share_F,
                "Largest over the labels of (mean activation on the label's test clips) / (the same summed over "
                "labels): 1 if the latent fires for one label only, 1 / labels if for all alike. Undefined where it "
                "never fires.",
            ),
        ),
    )


def _purity(
    largest_VF: NDArray[np.float32], class_V: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Purity [F] (NaN where too few videos fire) and its class [F]."""
    strongest_SF = np.argpartition(-largest_VF, _STRONGEST - 1, axis=0)[:_STRONGEST]
    class_SF = class_V[strongest_SF]
    counts_CF = np.stack([(class_SF == number).sum(axis=0) for number in range(classes)])
    purity_F = counts_CF.max(axis=0) / _STRONGEST
    purity_F[(largest_VF > 0).sum(axis=0) < _STRONGEST] = np.nan
    return purity_F, counts_CF.argmax(axis=0)


def _purer(purity: NDArray[np.float64], draws: NDArray[np.float64]) -> float:
    return float((purity > np.quantile(draws, 0.99)).mean())


def _histogram(purity: NDArray[np.float64], draws: NDArray[np.float64]) -> Curve:
    edges = (np.arange(_BINS + 2) - 0.5) / _BINS
    share, _ = np.histogram(purity, edges)
    null, _ = np.histogram(draws, edges)
    return Curve(
        name="labels.histogram",
        title="How pure latents are",
        x_label=f"purity of the {_STRONGEST} strongest videos",
        y_label="share of latents",
        x=tuple(float(x) for x in np.arange(_BINS + 1) / _BINS),
        lines=(
            Line(label="SAE", y=tuple(float(v) for v in share / len(purity))),
            Line(label="labels permuted", subject="permuted", y=tuple(float(v) for v in null / draws.size)),
        ),
        definition=f"Share of latents by purity, the share of the commonest label among the {_STRONGEST} strongest "
        "test videos; dashed: with the labels of the videos permuted.",
    )
