"""How well a linear probe reads the class of a video from its pooled code. [RECON: the paper's probe is not described]

fit side ─ penalty chosen on validation videos ─▶ probe ─▶ test videos: top-1, top-5
the same for raw activations, principal components, an untrained SAE and a random projection as wide as the SAE
paired bootstrap over test videos of SAE minus each of these
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.inputs.clip_selection import Parts
from tubelet_lens.inputs.labeled_clips import Labeled
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.clip_vectors import SUBJECT_WORDS, PoolingKind, subjects, vector_words, vectors
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.section import Figure, Section, Subject
from tubelet_lens.stats.linear_models import LEVEL, choose_penalty, fit_probe, interval

_PROBE = (
    "The probe is multinomial logistic regression on vectors standardized by the fitted-on clips, with an L2 penalty "
    "(chosen: {penalty:g}) of best top-1 on validation videos, then fitted on all of them; of a video in several clips "
    f"the probabilities are averaged. Range: {LEVEL:.0%} bootstrap interval over test videos."
)
_BOOTSTRAP = f"{LEVEL:.0%} bootstrap interval over test videos"

FIGURES = FigureTable(
    "action",
    FigureSpec(
        "top1",
        "Top-1, {title}",
        f"Share of test videos whose class is the most probable. A clip's vector is {{vector}}. {{draws}}{_PROBE}",
        n_of="test videos",
        style="percent",
        better="high",
        headline=True,
        null="action.top1.permuted",
        interval=_BOOTSTRAP,
        name="action.top1{pooling}.{subject}",
    ),
    FigureSpec(
        "top5",
        "Top-5, {title}",
        "Share of test videos whose class is among the 5 most probable. A clip's vector is {vector}. {draws}" + _PROBE,
        n_of="test videos",
        style="percent",
        better="high",
        null="exact: guessing gives 5 / number of classes",
        interval=_BOOTSTRAP,
        name="action.top5{pooling}.{subject}",
        when="more than five classes",
    ),
    FigureSpec(
        "permuted",
        "Top-1, {title}",
        "Null: the SAE's probe fitted to labels that were permuted among the fitted-on videos, with the same penalty; "
        "mean, lowest and highest of {draws} draws.",
        n_of="test videos",
        style="percent",
        interval="lowest and highest of the draws",
        name="action.top1.permuted",
    ),
    FigureSpec(
        "gain",
        "SAE's lead in top-1, {title}",
        "Top-1 of the SAE minus top-1 of {other}, in points of accuracy. Range: "
        f"{LEVEL:.0%} bootstrap interval ({{resamples}} draws) over test videos, paired: both probes are scored on the "
        "same drawn videos. An interval that holds 0 does not tell them apart.",
        n_of="test videos",
        style="percent",
        better="high",
        null="exact: 0 is no lead",
        interval=f"paired {_BOOTSTRAP}",
        name="action.gain{pooling}.{subject}",
    ),
    FigureSpec("chance", "Chance", "1 / number of classes: top-1 of guessing.", n_of="classes", style="percent"),
    FigureSpec(
        "commonest",
        "Always the commonest class",
        "Share of test videos of the class that most fitted-on clips have.",
        n_of="test videos",
        style="percent",
    ),
)

_TITLES: dict[PoolingKind, str] = {
    "mean": "mean pooling",
    "max": "max pooling",
    "mean_max": "mean and max pooling",
    "mean_then_encode": "mean pooling, then encoding",
}


@dataclass(frozen=True, eq=False)
class _Score:
    """Of one subject and pooling: share of its draws in which each test video is right."""

    top1_V: NDArray[np.float64]
    top5_V: NDArray[np.float64]
    by_draw: tuple[float, ...]
    """Top-1 of each draw."""
    penalty: float


def action(clips: ClipSetting) -> ClipResult | None:
    """Top-1 and top-5 of the probe; None without labels on both sides."""
    known, fit, parts = clips.labeled, clips.fit, clips.parts
    if known is None or fit is None or parts is None:
        return None
    probing = _Probing(clips, fit, parts, known)
    figures: list[Figure] = []
    for place, kind in enumerate(clips.config.action.poolings):
        scores = {subject: probing.score(subject, kind) for subject in subjects(clips)}
        figures += probing.accuracies(scores, kind, first=place == 0)
        if place == 0:
            figures.append(probing.permuted(scores["sae"], kind))
        figures += probing.gains(scores, kind, first=place == 0)
    return ClipResult(
        Section(
            name="action",
            title="Action probe",
            lead="Can a linear probe tell the class of a video from a clip's pooled code? "
            f"{known.classes} classes; fitted on {len(set(fit.videos[known.fit_rows])):,} videos, tested on "
            f"{len(known.video_class):,} others.",
            figures=(*figures, *probing.guesses()),
            notes=probing.notes(),
        )
    )


class _Probing:
    def __init__(self, clips: ClipSetting, fit: PooledSplit, parts: Parts, known: Labeled) -> None:
        self._clips, self._fit, self._known = clips, fit, known
        self._config = clips.config.action
        self._validation = parts.validation[known.fit_rows]
        self._videos = len(known.video_class)

    def score(self, subject: Subject, kind: PoolingKind) -> _Score:
        """Fit and test every draw."""
        known = self._known
        right, penalty = [], None
        for rows, test_rows in vectors(self._clips, self._fit, subject, kind):
            fit_rows = rows[known.fit_rows]
            if penalty is None:
                # One choice for all draws of a control.
                penalties, held = self._config.penalties, self._validation
                penalty = choose_penalty(fit_rows, known.fit_class, held, known.classes, penalties)
            right.append(self._right(fit_rows, known.fit_class, test_rows[known.test_rows], penalty))
        assert penalty is not None
        top1, top5 = (np.stack(parts) for parts in zip(*right, strict=True))
        return _Score(top1.mean(0), top5.mean(0), tuple(float(draw.mean()) for draw in top1), penalty)

    def _right(
        self, rows: NDArray[np.float32], class_N: NDArray[np.int64], test_rows: NDArray[np.float32], penalty: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Whether each test video's class is the most probable, and among the five most probable."""
        probe = fit_probe(rows, class_N, self._known.classes, penalty)
        probabilities_VC = self._known.by_video(probe.probabilities(test_rows))
        top_V5 = np.argsort(-probabilities_VC, axis=1, kind="stable")[:, :5]
        hit_V5 = top_V5 == self._known.video_class[:, None]
        return hit_V5[:, 0].astype(np.float64), hit_V5.any(1).astype(np.float64)

    def permuted(self, sae: _Score, kind: PoolingKind) -> Figure:
        """The null: labels of the fit side given to other videos."""
        known, seed = self._known, self._clips.config.seed
        rows, test_rows = next(vectors(self._clips, self._fit, "sae", kind))
        fit_rows, labeled_test_rows = rows[known.fit_rows], test_rows[known.test_rows]
        names, first, video = np.unique(
            self._fit.videos[known.fit_rows].astype(str), return_index=True, return_inverse=True
        )
        draws = []
        for draw in range(self._clips.config.control_draws):
            order = np.random.default_rng([seed, draw]).permutation(len(names))
            shuffled = known.fit_class[first][order][video]
            draws.append(float(self._right(fit_rows, shuffled, labeled_test_rows, sae.penalty)[0].mean()))
        value, ends = spread(draws)
        return FIGURES.fill(
            "permuted", value, self._videos, subject="permuted", ends=ends, title=_TITLES[kind], draws=len(draws)
        )

    def accuracies(self, scores: dict[Subject, _Score], kind: PoolingKind, *, first: bool) -> list[Figure]:
        """Top-1 of every subject, and top-5 where there are more than five classes."""
        figures = []
        for key in ("top1", "top5") if self._known.classes > 5 else ("top1",):
            for subject, score in scores.items():
                values_V = score.top1_V if key == "top1" else score.top5_V
                figures.append(
                    FIGURES.fill(
                        key,
                        float(values_V.mean()),
                        self._videos,
                        subject=subject,
                        ends=self._interval(values_V),
                        headline=first and subject == "sae",
                        title=_TITLES[kind],
                        pooling="" if first else f"_{kind}",
                        vector=vector_words(subject, kind),
                        draws=_draws(score, with_range=key == "top1"),
                        penalty=score.penalty,
                    )
                )
        return figures

    def gains(self, scores: dict[Subject, _Score], kind: PoolingKind, *, first: bool) -> list[Figure]:
        """SAE minus each control, paired."""
        figures = []
        for subject, score in scores.items():
            if subject == "sae":
                continue
            difference_V = scores["sae"].top1_V - score.top1_V
            figures.append(
                FIGURES.fill(
                    "gain",
                    float(difference_V.mean()),
                    self._videos,
                    subject=subject,
                    ends=self._interval(difference_V),
                    title=_TITLES[kind],
                    pooling="" if first else f"_{kind}",
                    other=SUBJECT_WORDS[subject],
                    resamples=f"{self._config.bootstrap:,}",
                )
            )
        return figures

    def _interval(self, values_V: NDArray[np.float64]) -> tuple[float, float]:
        return interval(values_V, draws=self._config.bootstrap, seed=self._clips.config.seed)

    def guesses(self) -> list[Figure]:
        """What needs no probe."""
        known = self._known
        commonest = int(np.bincount(known.fit_class).argmax())
        return [
            FIGURES.fill("chance", 1 / known.classes, known.classes),
            FIGURES.fill("commonest", float((known.video_class == commonest).mean()), self._videos),
        ]

    def notes(self) -> tuple[str, ...]:
        """How to read the figures."""
        notes = [
            "A code is wider than what it encodes, and width alone helps a linear probe: the SAE has learned something "
            "only as far as it leads the random projection and the untrained SAE.",
            "The SAE and the partition of the videos are one draw each: the intervals do not cover other training "
            "seeds.",
            "Other sections fit their own probes, with other accuracies: ablation omits the videos on which it ranks "
            "latents, and information scope probes raw activations.",
        ]
        unknown = int((self._known.video_class < 0).sum())
        if unknown:
            notes.append(f"{unknown:,} test videos are of classes without a fitted-on clip; they count as wrong.")
        return tuple(notes)


def _draws(score: _Score, *, with_range: bool) -> str:
    """Words on the draws of a control; empty where there is one."""
    if len(score.by_draw) == 1:
        return ""
    lowest_to_highest = f" (top-1 {min(score.by_draw):.1%} to {max(score.by_draw):.1%})" if with_range else ""
    return f"Mean of {len(score.by_draw)} random draws{lowest_to_highest}. "
