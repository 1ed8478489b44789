"""Segmentation edits: which patches change their predicted class when the latent of a class is suppressed
(Stevens et al., arXiv 2502.06755, section on semantic segmentation).

    fit side   linear probe of the last tokens ─▶ class of a patch
               latent of a class = argmax F1 over thresholds, among latents that fire on few tokens
    test side  the latent suppressed on every patch token, whatever it shows ─▶ predictions that change

[RECON] Different from the published script: thresholds apply to unclamped codes, the SAE gets activations in the units
it was trained on, and the ground truth of the edited patches is not used. Latents that fire on more than
`max_frequency` of the tokens are ignored, and so are patches of which the most common class covers less than
`label_threshold`; the paper names no limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, spread
from tubelet_lens.stats.linear_models import Probe, choose_penalty, fit_probe
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_lens.steering.class_edits import class_edit_section, edit_classes, edit_table
from tubelet_lens.steering.clip_source import ClipSource
from tubelet_lens.steering.patch_labels import BACKGROUND, CLASSES, NONE, Described, has_masks, patch_labels
from tubelet_lens.steering.readout import final_hook
from tubelet_pipeline.backbones import rewriting
from tubelet_pipeline.backbones.rewrite import Rewrite

THRESHOLDS = (0.0, 0.1, 0.3, 1.0)
"""Activations above which a latent marks a patch (as in saev)."""

# Patches per class to fit the probe on; patches of a video resemble each other.
_PATCHES_PER_CLASS = 2000

# Share of the videos on which the probe's penalty is chosen.
_VALIDATION = 0.2

FIGURES = edit_table(
    "segmentation_edits",
    "patches",
    FigureSpec(
        "accuracy",
        "Patches classified correctly, before",
        "Share of the test side's clear patches whose class the probe gives. {how}",
        n_of="patches",
        style="percent",
        better="high",
    ),
    FigureSpec(
        "iou",
        "Mean IoU of the classes, before",
        "Intersection over union of predicted and true patches, mean over the classes that occur on the test side, "
        "background included.",
        n_of="classes",
        better="high",
    ),
)


@dataclass(frozen=True, eq=False)
class _Fit:
    """What is fitted on the fit side.

    Attributes:
        probe: Class of a patch from its last token.
        latent_of: Best latent of each class but the background.
        f1_of: Its F1.
        largest_F, mean_F: Largest and mean activation there.
    """

    probe: Probe
    latent_of: dict[int, int]
    f1_of: dict[int, float]
    largest_F: NDArray[np.float64]
    mean_F: NDArray[np.float64]


class Marks:
    """Streaming counts of how well each latent marks each class at each threshold."""

    def __init__(self, latents: int, classes: int) -> None:
        self._hits = torch.zeros(len(THRESHOLDS), latents, classes, dtype=torch.float64)
        self._marked = torch.zeros(len(THRESHOLDS), latents, dtype=torch.float64)
        self._support_C = torch.zeros(classes, dtype=torch.float64)
        self._fired_F = torch.zeros(latents, dtype=torch.float64)
        self._size_F = torch.zeros(latents, dtype=torch.float64)
        self.largest_F = torch.zeros(latents, dtype=torch.float64)
        self._tokens = 0

    def add(self, codes_NF: Tensor, label_N: NDArray[np.int64]) -> None:
        """Add tokens with their labels; tokens without a label count in frequencies only."""
        codes_NF = codes_NF.cpu().double()
        self._fired_F += (codes_NF != 0).sum(0)
        self._size_F += codes_NF.abs().sum(0)
        self.largest_F = torch.maximum(self.largest_F, codes_NF.amax(0))
        self._tokens += len(codes_NF)
        clear = torch.from_numpy(label_N != NONE)
        truth = torch.nn.functional.one_hot(torch.from_numpy(label_N)[clear], self._hits.shape[2]).double()
        self._support_C += truth.sum(0)
        for place, threshold in enumerate(THRESHOLDS):
            above = (codes_NF[clear] > threshold).double()
            self._hits[place] += above.T @ truth
            self._marked[place] += above.sum(0)

    @property
    def mean_F(self) -> Tensor:
        """float64 [F] Mean |f| over all tokens."""
        return self._size_F / max(self._tokens, 1)

    def best(self, max_frequency: float) -> tuple[dict[int, int], dict[int, float]]:
        """Best latent of each class but the background, and its F1; classes that no latent marks are left out."""
        both = self._marked[:, :, None] + self._support_C
        f1_FC = (2 * self._hits / both.clamp_min(1)).amax(0)
        usable_F = (self._fired_F > 0) & (self._fired_F < max_frequency * self._tokens)
        f1_FC = torch.where(usable_F[:, None], f1_FC, torch.zeros_like(f1_FC))
        latent_of = {
            number: int(f1_FC[:, number].argmax())
            for number in range(f1_FC.shape[1])
            if number != BACKGROUND and float(f1_FC[:, number].max()) > 0
        }
        return latent_of, {number: float(f1_FC[latent, number]) for number, latent in latent_of.items()}


def segmentation_edits(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """The rates; None without a fit side or masks of both sides' videos."""
    if session.fit_source is None or clips.fit is None:
        return None
    config, test = session.config, clips.test
    fit_root, test_root = session.fit_source.root, session.test_source.root
    videos = ((fit_root, clips.fit.videos[session.fit_rows[0]]), (test_root, test.videos[session.rows[0]]))
    if not all(has_masks(root, str(video)) for root, video in videos):
        return None
    fit = _fit(session, session.fit_source, clips.fit, clips.config.seed)
    labels = [
        patch_labels(
            test_root, _described(test, row), clip, session.backbone.grid, config.masks, config.label_threshold
        )
        for row, clip in zip(session.rows, session.clips, strict=True)
    ]
    label_N = np.concatenate([each.ravel() for each in labels])
    clear_N = label_N != NONE
    hook = final_hook(session.backbone)

    def predict(rewrite: Rewrite | None) -> NDArray[np.int64]:
        predicted = []
        for batch in session.batches():
            with rewriting(session.backbone, session.hook, rewrite or (lambda _tokens: None)):
                tokens = session.backbone.activations(batch, [hook])[hook].tokens
            predicted.append(_classes(fit.probe, tokens.float().flatten(0, 2).cpu().numpy()))
        return np.concatenate(predicted)[clear_N]

    before = predict(None)
    if not fit.latent_of or not len(before):
        return None
    edits = edit_classes(
        predict,
        session.sae,
        fit.latent_of,
        largest_F=fit.largest_F,
        mean_F=fit.mean_F,
        strengths=config.strengths,
        draws=config.control_draws,
        seed=clips.config.seed,
    )
    names = CLASSES[config.masks]
    chosen = ", ".join(f"{names[number]} {latent}" for number, latent in fit.latent_of.items())
    how = (
        f"Patches are classified by {config.masks} with a linear probe of the tokens at {hook}, fitted on up to "
        f"{_PATCHES_PER_CLASS:,} patches per class of the fit side, its penalty chosen on {_VALIDATION:.0%} of the "
        "videos there; only patches that one class covers to "
        f"{config.label_threshold:.0%} or more count, on both sides. A class's latent has the largest F1 over the "
        f"thresholds {', '.join(f'{t:g}' for t in THRESHOLDS)} among those that fire on less than "
        f"{config.max_frequency:.0%} of the fit side's tokens; the background is not edited ({chosen})."
    )
    truth = label_N[clear_N]
    f1, ends = spread(list(fit.f1_of.values()))
    extra = (
        FIGURES.fill("accuracy", float((before == truth).mean()), len(truth), how=how),
        FIGURES.fill("iou", _mean_iou(before, truth), len(np.unique(truth))),
        FIGURES.fill("f1", f1, len(fit.f1_of), ends=ends, how=how),
    )
    section = class_edit_section(
        edits,
        table=FIGURES,
        title="Segmentation edits",
        lead="Does suppressing the latent of a class in the running backbone take that class, and it alone, out of the "
        "predictions?",
        how=how,
        extra=extra,
    )
    return ClipResult(section)


def _described(side: PooledSplit, row: int) -> Described:
    template, caption = side.label_names[row], side.captions[row]
    return Described(
        str(side.videos[row]), None if template is None else str(template), None if caption is None else str(caption)
    )


def _fit(session: BackboneSession, source: ClipSource, side: PooledSplit, seed: int) -> _Fit:
    config, grid = session.config, session.backbone.grid
    hook, classes = final_hook(session.backbone), len(CLASSES[config.masks])
    marks, rng = Marks(session.sae.latents, classes), np.random.default_rng(seed)
    tokens: list[NDArray[np.float32]] = []
    truth: list[NDArray[np.int64]] = []
    kept_of: list[int] = []
    numbers = [int(clip) for clip in side.clips[session.fit_rows]]
    for place, clip in enumerate(source.clips(numbers)):
        described = _described(side, int(session.fit_rows[place]))
        label_N = patch_labels(source.root, described, clip, grid, config.masks, config.label_threshold).ravel()
        got = session.backbone.activations(clip.pixels[None], [session.hook, hook])
        with torch.no_grad():
            marks.add(session.sae.encode(got[session.hook].tokens[0].float().flatten(0, 1)), label_N)
        # A share of each class's patches of every clip, so that late clips count as early ones do.
        kept = _share(label_N, classes, _PATCHES_PER_CLASS / len(numbers), rng)
        tokens.append(got[hook].tokens[0].float().flatten(0, 1).cpu().numpy()[kept])
        truth.append(label_N[kept])
        kept_of.append(len(kept))
    rows_ND, class_N = np.concatenate(tokens), np.concatenate(truth)
    validation_N = validation_rows(side.videos[session.fit_rows].tolist(), kept_of, seed)
    penalty = choose_penalty(rows_ND, class_N, validation_N, classes, (1e-4, 1e-3, 1e-2))
    latent_of, f1_of = marks.best(config.max_frequency)
    return _Fit(
        probe=fit_probe(rows_ND, class_N, classes, penalty),
        latent_of=latent_of,
        f1_of=f1_of,
        largest_F=marks.largest_F.numpy(),
        mean_F=marks.mean_F.numpy(),
    )


def validation_rows(videos: Sequence[str], rows: Sequence[int], seed: int) -> NDArray[np.bool_]:
    """bool [sum of `rows`] Patches on which the penalty is chosen: those of a fifth of the videos.

    All clips of a video are on one side, because they show the same objects.

    Args:
        videos: [K] Video of each clip.
        rows: [K] Number of patches of each.
        seed: Seed of the choice of videos.
    """
    chosen_K = partition(videos, validation=_VALIDATION, ranking=0, seed=seed).validation
    return np.repeat(chosen_K, rows)


def _share(label_N: NDArray[np.int64], classes: int, each: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Tokens of one clip to fit on: `each` of the background, and `each` x `classes` of any other class."""
    kept = []
    for number in range(classes):
        of_class = np.flatnonzero(label_N == number)
        # Every video shows the background, few show a given object.
        most = max(1, round(each if number == BACKGROUND else each * classes))
        kept.append(rng.permutation(of_class)[:most])
    return np.concatenate(kept)


def _classes(probe: Probe, rows_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    predicted_N: NDArray[np.int64] = probe.logits(rows_ND).argmax(1)
    return predicted_N


def _mean_iou(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float(
        np.mean(
            [
                ((predicted == number) & (truth == number)).sum() / ((predicted == number) | (truth == number)).sum()
                for number in np.unique(truth)
            ]
        )
    )
