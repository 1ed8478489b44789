"""Ablation in the code that the action probe reads: how few latents carry a class.

    fit side but its ranking part ─▶ probe     ranking part ─▶ importance     test side ─▶ accuracy with latents at 0

This is no causal evidence about the backbone: it is not run again, only the probe's input changes. [RECON: the paper
names no measure of importance and no matching of the random sets; both are chosen here.]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.inputs.labeled_clips import Labeled
from tubelet_lens.metrics.class_ranking import rank_latents, ranked
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Figure, Line, Section
from tubelet_lens.stats.ablation_curve import Ablation, ablate, accuracy_lines, gini, set_sizes
from tubelet_lens.stats.linear_models import softmax

_HOW = (
    "The probe reads the mean of a clip's codes over its tokens and was fitted without the ranking part; importance of "
    "latent j for class c is |w_cj| |E[z_j | c]|, on the ranking part; accuracies are of test videos."
)

_AREA = (
    "Mean over the sizes m = 1, 2, 4, ... of (accuracy before - accuracy with m latents at 0) / (accuracy before - "
    "chance): the area over the curve, on a logarithmic axis. 1: all is lost at once. Undefined where the probe is not "
    "above chance."
)

FIGURES = FigureTable(
    "ablation",
    FigureSpec(
        "before",
        "Accuracy before",
        f"Top-1 with nothing at 0. {_HOW}",
        n_of="test videos",
        style="percent",
        better="high",
        null="action.chance",
        name="ablation.before.sae",
    ),
    FigureSpec(
        "m50",
        "Latents that carry half (m_50)",
        "Smallest m for which setting the m most important latents of all classes together to 0 costs half of "
        "(accuracy - chance), chance {chance}; undefined if {largest} do not. The importance of a latent is its mean "
        f"over the clips of the ranking part. {_HOW}",
        n_of="alive latents",
        style="count",
        better="low",
        headline=True,
        null="ablation.m50.random",
        name="ablation.m50.sae",
    ),
    FigureSpec(
        "m50_random",
        "Latents that carry half (m_50)",
        "Smallest of m = 1, 2, 4, ... {largest} at which the mean accuracy of {draws} random sets has lost half; "
        "undefined if none has. Each set is drawn among the other alive latents, one of nearest mean activation for "
        "each of the m most important.",
        n_of="alive latents",
        style="count",
        name="ablation.m50.random",
    ),
    FigureSpec(
        "area",
        "Area lost",
        f"With the most important latents at 0. {_AREA}",
        n_of="test videos",
        better="high",
        null="ablation.area.random",
        name="ablation.area.sae",
    ),
    FigureSpec(
        "area_random",
        "Area lost",
        f"With matched random latents at 0; mean, lowest and highest of {{draws}} draws. {_AREA}",
        n_of="test videos",
        interval="lowest and highest of the draws",
        name="ablation.area.random",
    ),
    FigureSpec(
        "area_bottom",
        "Area lost with the least important latents",
        f"With the m alive latents of least importance at 0. {_AREA}",
        n_of="test videos",
        better="low",
        null="ablation.area.random",
    ),
    FigureSpec(
        "match",
        "Activity of the random latents, relative to the important ones",
        "Mean activation of the {largest} random latents over that of the {largest} most important. 1: fully matched; "
        "below 1 there were no other latents so active, and the comparison favors the important ones.",
        n_of="draws",
    ),
    FigureSpec(
        "class_m50",
        "m_50 of a single class, median",
        "Per class: smallest m for which setting the class's m most important latents to 0 costs half of (its accuracy "
        f"- chance); median over the classes, undefined if most do not get there by {{largest}}. {_HOW}",
        n_of="classes of the probe",
        better="low",
        name="ablation.class_m50.sae",
        when="the probe is above chance on a class",
    ),
    FigureSpec(
        "class_area",
        "Area lost by a single class",
        "The area lost of a class's own accuracy with its own most important latents at 0, mean over the classes.",
        n_of="classes of the probe",
        better="high",
        null="ablation.class_area.random",
        name="ablation.class_area.sae",
        when="the probe is above chance on a class",
    ),
    FigureSpec(
        "class_area_random",
        "Area lost by a single class",
        "The same with matched random latents at 0, {draws} draws per class and size.",
        n_of="classes of the probe",
        name="ablation.class_area.random",
        when="the probe is above chance on a class",
    ),
    FigureSpec(
        "class_others",
        "Area lost by the other classes",
        "With a class's most important latents at 0: share of the other classes' accuracy that is lost, mean over the "
        "sizes and classes. Small compared with the area lost by the class itself: the latents are specific to it.",
        n_of="classes of the probe",
        better="low",
        null="ablation.class_area.sae",
        when="the probe is above chance on a class",
    ),
    FigureSpec(
        "gini",
        "Concentration (Gini)",
        "Gini coefficient over the alive latents of the effects |w_cj| E[z_j | c], on the test videos of class c; mean "
        "over the classes. 0: all latents matter alike; toward 1: one carries everything.",
        n_of="classes of the probe",
        better="high",
        when="the probe is above chance on a class",
    ),
)


@dataclass(frozen=True, eq=False)
class _Reading:
    """The probe and what it reads on the test side."""

    known: Labeled
    weights_CF: NDArray[np.float64]
    codes_NF: NDArray[np.float32]
    logits_NC: NDArray[np.float64]

    def of(self, videos: NDArray[np.bool_]) -> _Reading:
        """The reading of some of the videos alone."""
        rows = videos[self.known.video]
        place = np.cumsum(videos) - 1
        known = replace(
            self.known,
            test_rows=self.known.test_rows[rows],
            video=place[self.known.video[rows]],
            video_class=self.known.video_class[videos],
        )
        return _Reading(known, self.weights_CF, self.codes_NF[rows], self.logits_NC[rows])

    def accuracy(self, latents: NDArray[np.int64]) -> float:
        """Share of the videos that the probe has right with `latents` at 0."""
        return float(self.right(latents).mean())

    def right(self, latents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [V]: test videos that the probe has right with `latents` at 0."""
        left_NC = self.logits_NC - self.codes_NF[:, latents].astype(np.float64) @ self.weights_CF[:, latents].T
        right_V: NDArray[np.bool_] = self.known.by_video(softmax(left_NC)).argmax(1) == self.known.video_class
        return right_V


@dataclass(frozen=True, eq=False)
class _OfClass:
    """Ablation of one class's latents."""

    ablation: Ablation
    others: NDArray[np.float64]
    """[sizes] Share of the other classes' accuracy that is lost with the class's top m at 0."""
    gini: float | None


def code_ablation(clips: ClipSetting) -> ClipResult | None:
    """Curves, m_50 and concentration; None without labels, or where fewer than two latents are alive."""
    ranking = rank_latents(clips)
    if ranking is None:
        return None
    settings, known, weights_CF = clips.config.ablation, ranking.known, ranking.probe.weights_CF
    importance_CF, mean_F, alive_F = ranking.importance_CF, ranking.mean_F, ranking.alive_F
    sizes = set_sizes(int(alive_F.sum()), settings.largest)
    if not sizes:
        return None
    test_NF = clips.test.pooled["sae"].mean_NF[known.test_rows]
    reading = _Reading(
        known=known,
        weights_CF=weights_CF,
        codes_NF=test_NF,
        logits_NC=ranking.probe.logits(test_NF),
    )
    chance = 1 / known.classes

    def one(
        measure: Callable[[NDArray[np.int64]], float],
        importance_F: NDArray[np.float64],
        matched_F: NDArray[np.float64],
        number: int,
    ) -> tuple[Ablation, NDArray[np.int64]]:
        order = ranked(importance_F, alive_F)
        rng = np.random.default_rng([clips.config.seed, number])
        return ablate(measure, order, matched_F, sizes=sizes, draws=settings.draws, chance=chance, rng=rng), order

    whole, _ = one(reading.accuracy, ranking.importance_F, mean_F, known.classes)
    right_V = reading.right(np.empty(0, dtype=np.int64))
    by_class = {}
    for number in np.unique(known.video_class[known.video_class >= 0]):
        own = known.video_class == number
        # A latent silent in this class is matched by latents silent in it too.
        of_ranked = ranking.codes_NF[ranking.class_N == number]
        in_class_F = np.abs(of_ranked).mean(axis=0, dtype=np.float64) if len(of_ranked) else mean_F
        matched_F = np.maximum(in_class_F, np.finfo(np.float64).tiny)
        of_class, order = one(reading.of(own).accuracy, importance_CF[number], matched_F, int(number))
        others = ~own & (known.video_class >= 0)
        before = float(right_V[others].mean()) if others.any() else 0.0
        kept = [float(reading.right(order[:size])[others].mean()) if before else 0.0 for size in sizes]
        lost = 1 - np.array(kept) / before if before else np.zeros(len(sizes))
        rows = own[known.video]
        effect_F = np.abs(weights_CF[number]) * np.abs(test_NF[rows]).mean(axis=0, dtype=np.float64)
        by_class[int(number)] = _OfClass(of_class, lost, gini(effect_F[alive_F]))
    largest_CF = np.where(importance_CF > 0, importance_CF, 0)
    strongest_F = largest_CF.max(axis=0)
    return ClipResult(
        _section(known, whole, by_class, settings.draws, int(alive_F.sum())),
        (
            LatentColumn(
                "probe_importance",
                strongest_F,
                "Largest over the classes of |w_cj| |E[z_j | c]|: how far the latent's mean activation on a class's "
                "clips moves that class's logit of the action probe.",
            ),
            LatentColumn(
                "probe_label",
                np.where(strongest_F > 0, known.labels[largest_CF.argmax(axis=0)].astype(np.float64), np.nan),
                "Label of that class; undefined where the latent moves none.",
            ),
        ),
    )


def _section(known: Labeled, whole: Ablation, by_class: dict[int, _OfClass], draws: int, alive: int) -> Section:
    # Accuracy on a class that the probe was not fitted on cannot fall.
    classes = {number: of for number, of in by_class.items() if of.ablation.before > of.ablation.chance}
    return Section(
        name="ablation",
        title="Ablation in the code",
        lead="How few latents does the action probe need? The latents that matter most to it are set to 0 in the code, "
        "against random ones that are as active. This changes what the probe is given; nothing is run again in the "
        "backbone, so it is no causal evidence about the backbone.",
        figures=(
            *_figures(known, whole, draws, alive),
            *(_figures_by_class(classes, draws) if classes else ()),
        ),
        curves=(
            _curve(whole, draws),
            *((_curve_by_class(classes, draws),) if classes else ()),
        ),
        notes=(
            "Few latents (a small m_50, a Gini coefficient near 1) mean that what the probe uses is concentrated; the "
            "random latents show what taking away as much activity does by itself.",
            "The more latents are taken, the fewer are left to match: the random ones' activity is in the table.",
            "The accuracy before differs from the action probe's: this probe was fitted without the ranking part.",
        ),
    )


def _figures(known: Labeled, whole: Ablation, draws: int, alive: int) -> list[Figure]:
    videos, largest = len(known.video_class), whole.sizes[-1]
    random_below_half = whole.random.mean(axis=0) <= _half(whole)
    random_m50 = whole.sizes[int(np.argmax(random_below_half))] if random_below_half.any() else None
    random_area, ends = spread(whole.random_areas)
    words: dict[str, Any] = {"draws": draws, "largest": largest}
    return [
        FIGURES.fill("before", whole.before, videos),
        FIGURES.fill("m50", whole.m_50, alive, chance=f"{whole.chance:.1%}", **words),
        FIGURES.fill("m50_random", random_m50, alive, subject="random", **words),
        FIGURES.fill("area", whole.area(whole.top), videos),
        FIGURES.fill("area_random", random_area, videos, subject="random", ends=ends, **words),
        FIGURES.fill("area_bottom", whole.area(whole.bottom), videos),
        FIGURES.fill("match", whole.mismatch, draws, **words),
    ]


def _figures_by_class(classes: dict[int, _OfClass], draws: int) -> list[Figure]:
    of, count = [one.ablation for one in classes.values()], len(classes)
    median = float(np.median([np.inf if one.m_50 is None else one.m_50 for one in of]))
    top = [area for one in of if (area := one.area(one.top)) is not None]
    random = [float(np.mean([one.area(draw) for draw in one.random])) for one in of]
    concentrations = [one.gini for one in classes.values() if one.gini is not None]
    others = [float(one.others.mean()) for one in classes.values()]
    return [
        FIGURES.fill("class_m50", median if np.isfinite(median) else None, count, largest=of[0].sizes[-1]),
        FIGURES.fill("class_area", float(np.mean(top)), count),
        FIGURES.fill("class_area_random", float(np.mean(random)), count, subject="random", draws=draws),
        FIGURES.fill("class_others", float(np.mean(others)), count),
        FIGURES.fill("gini", float(np.mean(concentrations)) if concentrations else None, count),
    ]


def _half(whole: Ablation) -> float:
    return whole.before - (whole.before - whole.chance) / 2 if whole.before > whole.chance else -np.inf


def _curve(whole: Ablation, draws: int) -> Curve:
    return Curve(
        name="ablation.curve",
        title="Accuracy as latents are taken away",
        x_label="latents at 0",
        y_label="top-1 of test videos",
        x=tuple(float(size) for size in whole.sizes),
        lines=(
            *accuracy_lines(whole),
            Line(label="chance", subject="permuted", y=(whole.chance,) * len(whole.sizes)),
        ),
        definition="Top-1 with the m most important latents of all classes together at 0, with the m least important, "
        f"and with m random ones matched in mean activation (mean and range of {draws} draws). {_HOW}",
        log_x=True,
    )


def _curve_by_class(classes: dict[int, _OfClass], draws: int) -> Curve:
    of = [one.ablation for one in classes.values()]
    own = [one.top / one.before for one in of]
    random = [one.random.mean(axis=0) / one.before for one in of]
    return Curve(
        name="ablation.class_curve",
        title="What a class keeps when its own latents are taken away",
        x_label="latents of one class at 0",
        y_label="share of accuracy kept",
        x=tuple(float(size) for size in of[0].sizes),
        lines=(
            Line(label="the class itself", y=tuple(map(float, np.mean(own, axis=0)))),
            Line(
                label="the other classes",
                subject="raw",
                y=tuple(map(float, 1 - np.mean([one.others for one in classes.values()], axis=0))),
            ),
            Line(label="itself, matched random", subject="random", y=tuple(map(float, np.mean(random, axis=0)))),
        ),
        definition="Accuracy over accuracy before, mean over the classes of the probe: of a class with its own "
        "m most important latents at 0, of all other classes with the same latents at 0, and of the class with m "
        f"random latents of the same mean activation at 0 ({draws} draws). {_HOW}",
        log_x=True,
    )
