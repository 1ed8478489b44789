"""Downstream recovery: how well the backbone still predicts classes from the SAE's reconstruction.

    original          x
    reconstruction    x^ on every patch token (special tokens stay)
    mean ablation     the mean activation on every patch token

recovered = (m(x^) - m(mean)) / (m(x) - m(mean)) of a measure m: cross-entropy, top-1, KL to the original prediction.
This is the "loss recovered" of the language literature, with mean ablation as baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.section import Section, ratio
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True)
class Predictions:
    """Quality of the predictions with one kind of activation.

    Attributes:
        loss: Mean cross-entropy of the true class; None without labeled clips.
        top1: Accuracy on labeled clips; None without them.
        kl: Mean KL divergence from the original predictions, nats.
    """

    loss: float | None
    top1: float | None
    kl: float


@dataclass(frozen=True)
class Recovery:
    """Predictions from the original, reconstructed and mean-ablated activations."""

    original: Predictions
    reconstructed: Predictions
    ablated: Predictions

    def recovered(self, measure: str) -> float | None:
        """Recovered share of "loss", "top1" or "kl"; None if it is undefined or mean ablation costs nothing."""
        values = [getattr(each, measure) for each in (self.original, self.reconstructed, self.ablated)]
        if any(value is None for value in values):
            return None
        original, reconstructed, ablated = values
        return ratio(reconstructed - ablated, original - ablated)


class Reconstruct:
    """A rewrite that replaces x by its reconstruction x^."""

    def __init__(self, sae: SAE) -> None:
        self._sae = sae

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T', S, D]"""
        with torch.no_grad():
            clips = [self._sae(clip.float().flatten(0, 1)).view(clip.shape) for clip in tokens]
        return torch.stack(clips).to(tokens.dtype)


class MeanAblate:
    """A rewrite that replaces every token by one vector."""

    def __init__(self, mean_D: Tensor) -> None:
        self._mean_D = mean_D

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T', S, D]"""
        return self._mean_D.to(tokens).expand_as(tokens)


def recover(session: BackboneSession, mean_D: Tensor) -> Recovery:
    """Predictions on the clips of `session` with the three kinds of activation."""
    original = session.logits()
    reconstructed = session.logits(Reconstruct(session.sae))
    ablated = session.logits(MeanAblate(mean_D))
    return Recovery(*(predictions(original, logits, session.class_N) for logits in (original, reconstructed, ablated)))


def predictions(original_NC: Tensor, logits_NC: Tensor, class_N: NDArray[np.int64]) -> Predictions:
    """Quality of the predictions `logits_NC`; clips of class -1 count in the KL divergence only."""
    known = torch.from_numpy(class_N >= 0)
    truth, chosen = torch.from_numpy(class_N)[known], logits_NC[known].double()
    old, new = original_NC.double().log_softmax(1), logits_NC.double().log_softmax(1)
    return Predictions(
        loss=float(nnf.cross_entropy(chosen, truth)) if len(truth) else None,
        top1=float((chosen.argmax(1) == truth).double().mean()) if len(truth) else None,
        kl=max(0.0, float(nnf.kl_div(new, old, log_target=True, reduction="batchmean"))),
    )


def recovery(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """The figures; None without a readout."""
    if session.readout is None:
        return None
    recovered = recover(session, torch.from_numpy(clips.setting.store.moments(clips.setting.hook).mean).float())
    return ClipResult(_section(recovered, session, session.readout.description))


_MEASURES: tuple[tuple[str, str, str, Literal["number", "percent"], Literal["low", "high"]], ...] = (
    ("loss", "Cross-entropy", "Mean over labeled clips of -log p(true class)", "number", "low"),
    ("top1", "Top-1", "Share of labeled clips whose class is the most probable one", "percent", "high"),
    ("kl", "KL divergence", "Mean over clips of KL(classes without edit || classes now), in nats", "number", "low"),
)


def _specs() -> Iterator[FigureSpec]:
    """Rows of each measure: with the reconstruction, as it is, mean ablated, and the share recovered."""
    for measure, title, definition, style, better in _MEASURES:
        for way, row, tokens in (
            ("sae", title, "with the SAE's reconstruction on every patch token"),
            ("raw", title, "with the original activations"),
            ("mean", f"{title}, mean ablated", "with the mean activation on every patch token"),
        ):
            yield FigureSpec(
                f"{measure}_{way}",
                row,
                f"{definition}, {tokens} at {{hook}}. Classes are read by {{readout}}.",
                n_of="clips",
                style=style,
                better=better,
                null=f"recovery.{measure}.mean" if way == "sae" else "",
                name=f"recovery.{measure}.{way}",
            )
        yield FigureSpec(
            f"recovered_{measure}",
            f"Recovered, {title}",
            "(m(x̂) - m(mean)) / (m(x) - m(mean)) of the same measure m: 1 if the reconstruction does as well as the "
            "activation, 0 if no better than the mean. Above 1 and below 0 are possible. Undefined where the mean does "
            "as well as the activation.",
            n_of="clips",
            style="percent",
            better="high",
            headline=measure == "kl",
            null="exact: 0 is the mean activation, 1 the activation itself",
        )


FIGURES = FigureTable("recovery", *_specs())


def _section(recovered: Recovery, session: BackboneSession, readout: str) -> Section:
    labeled = int((session.class_N >= 0).sum())
    words: dict[str, Any] = {"hook": session.hook, "readout": readout}
    figures = []
    for measure, *_ in _MEASURES:
        count = len(session.class_N) if measure == "kl" else labeled
        original, reconstructed, ablated = (
            getattr(way, measure) for way in (recovered.original, recovered.reconstructed, recovered.ablated)
        )
        figures += [
            FIGURES.fill(f"{measure}_sae", reconstructed, count, **words),
            FIGURES.fill(f"{measure}_raw", original, count, subject="raw", **words),
            FIGURES.fill(f"{measure}_mean", ablated, count, **words),
            FIGURES.fill(f"recovered_{measure}", recovered.recovered(measure), count),
        ]
    return Section(
        name="recovery",
        title="Downstream recovery",
        lead="Are the same classes read when the backbone continues from the SAE's reconstruction of its activation? "
        f"Classes are read by {readout}.",
        figures=tuple(figures),
        notes=(
            "Special tokens (CLS, registers) keep their values. Where classes are read from them, part of the "
            "prediction "
            "bypasses the SAE, and mean ablation does not remove it either.",
        ),
    )
