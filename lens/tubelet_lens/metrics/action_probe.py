"""How much of what is done in a video can be read off its pooled code by a linear probe (science note 1.5 [RECON]).

fit side ─ penalty chosen on validation videos ─▶ probe ─▶ test videos: top-1, top-5
the same for raw activations, principal components, an untrained SAE and a random projection as wide as the SAE
paired bootstrap over test videos of SAE minus each of these
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.inputs.clip_selection import Parts
from tubelet_lens.inputs.labeled_clips import Labeled
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.clip_vectors import SUBJECT_WORDS, PoolingKind, subjects, vector_words, vectors
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.section import Figure, Section, Subject
from tubelet_lens.stats.linear_models import LEVEL, choose_penalty, fit_probe, interval

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
            lead="Can a linear probe tell from a clip's pooled code what is done in the video? "
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
        known, device = self._known, self._clips.setting.device
        found, penalty = [], None
        for rows, test_rows in vectors(self._clips, self._fit, subject, kind):
            here = rows[known.fit_rows]
            if penalty is None:
                # Draws of one kind of control want the same penalty.
                penalties, held = self._config.penalties, self._validation
                penalty = choose_penalty(here, known.fit_class, held, known.classes, penalties, device)
            probe = fit_probe(here, known.fit_class, known.classes, penalty, device)
            found.append(_right(known.by_video(probe.probabilities(test_rows[known.test_rows])), known.video_class))
        assert penalty is not None
        top1, top5 = (np.stack(parts) for parts in zip(*found, strict=True))
        return _Score(top1.mean(0), top5.mean(0), tuple(float(draw.mean()) for draw in top1), penalty)

    def permuted(self, sae: _Score, kind: PoolingKind) -> Figure:
        """The null: labels of the fit side given to other videos."""
        known, device = self._known, self._clips.setting.device
        rows, test_rows = next(vectors(self._clips, self._fit, "sae", kind))
        here, there = rows[known.fit_rows], test_rows[known.test_rows]
        names, first, video = np.unique(
            self._fit.videos[known.fit_rows].astype(str), return_index=True, return_inverse=True
        )
        draws = []
        for draw in range(self._clips.config.control_draws):
            order = np.random.default_rng([self._clips.config.seed, draw]).permutation(len(names))
            shuffled = known.fit_class[first][order][video]
            probe = fit_probe(here, shuffled, known.classes, sae.penalty, device)
            draws.append(_right(known.by_video(probe.probabilities(there)), known.video_class)[0].mean())
        return Figure(
            name="action.top1.permuted",
            title=f"Top-1, {_TITLES[kind]}",
            subject="permuted",
            value=float(np.mean(draws)),
            low=float(min(draws)),
            high=float(max(draws)),
            n=self._videos,
            n_of="test videos",
            definition="Null: the SAE's probe fitted to labels that were dealt out anew among the fitted-on videos, "
            f"with the same penalty; mean, lowest and highest of {len(draws)} draws.",
            style="percent",
        )

    def accuracies(self, scores: dict[Subject, _Score], kind: PoolingKind, *, first: bool) -> list[Figure]:
        """Top-1 of every subject, and top-5 where there are more than five classes."""
        figures = []
        for top in (1, 5) if self._known.classes > 5 else (1,):
            for subject, score in scores.items():
                values = score.top1_V if top == 1 else score.top5_V
                low, high = interval(values, draws=self._config.bootstrap, seed=self._clips.config.seed)
                figures.append(
                    Figure(
                        name=f"action.top{top}{'' if first else f'_{kind}'}.{subject}",
                        title=f"Top-{top}, {_TITLES[kind]}",
                        subject=subject,
                        value=float(values.mean()),
                        low=low,
                        high=high,
                        n=self._videos,
                        n_of="test videos",
                        definition=self._definition(top, subject, kind, score),
                        style="percent",
                        better="high",
                        headline=first and top == 1 and subject == "sae",
                    )
                )
        return figures

    def _definition(self, top: int, subject: Subject, kind: PoolingKind, score: _Score) -> str:
        words = (
            f"Share of test videos whose class is {'the most' if top == 1 else f'among the {top} most'} probable. "
            f"A clip's vector is {vector_words(subject, kind)}. "
        )
        if len(score.by_draw) > 1:
            words += f"Mean of {len(score.by_draw)} random draws"
            words += f" (top-1 {min(score.by_draw):.1%} to {max(score.by_draw):.1%}). " if top == 1 else ". "
        return (
            f"{words}The probe is multinomial logistic regression on vectors standardized by the fitted-on clips, with "
            f"an L2 penalty (chosen: {score.penalty:g}) of best top-1 on validation videos, then fitted on all of "
            f"them; of a video in several clips the probabilities are averaged. Range: {LEVEL:.0%} bootstrap interval "
            "over test videos."
        )

    def gains(self, scores: dict[Subject, _Score], kind: PoolingKind, *, first: bool) -> list[Figure]:
        """SAE minus each control, paired."""
        figures = []
        for subject, score in scores.items():
            if subject == "sae":
                continue
            difference = scores["sae"].top1_V - score.top1_V
            low, high = interval(difference, draws=self._config.bootstrap, seed=self._clips.config.seed)
            figures.append(
                Figure(
                    name=f"action.gain{'' if first else f'_{kind}'}.{subject}",
                    title=f"SAE's lead in top-1, {_TITLES[kind]}",
                    subject=subject,
                    value=float(difference.mean()),
                    low=low,
                    high=high,
                    n=self._videos,
                    n_of="test videos",
                    definition=f"Top-1 of the SAE minus top-1 of {SUBJECT_WORDS[subject]}, in points of accuracy. "
                    f"Range: {LEVEL:.0%} bootstrap interval ({self._config.bootstrap:,} draws) over test videos, "
                    "paired: both probes are scored on the same drawn videos. An interval that holds 0 does not tell "
                    "them apart.",
                    style="percent",
                    better="high",
                )
            )
        return figures

    def guesses(self) -> list[Figure]:
        """What needs no probe."""
        known = self._known
        commonest = int(np.bincount(known.fit_class).argmax())
        return [
            Figure(
                name="action.chance",
                title="Chance",
                value=1 / known.classes,
                n=known.classes,
                n_of="classes",
                definition="1 / number of classes: top-1 of guessing.",
                style="percent",
            ),
            Figure(
                name="action.commonest",
                title="Always the commonest class",
                value=float((known.video_class == commonest).mean()),
                n=self._videos,
                n_of="test videos",
                definition="Share of test videos of the class that most fitted-on clips have.",
                style="percent",
            ),
        ]

    def notes(self) -> tuple[str, ...]:
        """How to read it."""
        notes = [
            "A code is wider than what it encodes, and width alone helps a linear probe: the SAE has learned something "
            "only as far as it leads the random projection and the untrained SAE.",
            "The SAE and the partition of the videos are one draw each: the intervals say nothing of other training "
            "seeds.",
        ]
        unknown = int((self._known.video_class < 0).sum())
        if unknown:
            notes.append(f"{unknown:,} test videos are of classes without a fitted-on clip; they count as wrong.")
        return tuple(notes)


def _right(probabilities_VC: Tensor, class_V: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Whether each video's class is the most probable, and among the five most probable."""
    top = probabilities_VC.topk(min(5, probabilities_VC.shape[1]), dim=1).indices
    hit = top == torch.from_numpy(class_V).to(top)[:, None]
    return hit[:, 0].double().cpu().numpy(), hit.any(1).double().cpu().numpy()
