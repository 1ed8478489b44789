"""How much of what the backbone says of a clip survives when the SAE's reconstruction takes the activation's place.

    as it is          x
    reconstruction    x^ on every patch token (special tokens stay)
    mean ablation     the mean activation on every patch token

recovered = (m(x^) - m(mean)) / (m(x) - m(mean)) of a measure m: cross-entropy, top-1, KL to what is said as it is
(science note 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.section import Figure, Section, ratio
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True)
class Said:
    """Measures of one way of running the backbone.

    Attributes:
        loss: Mean cross-entropy of the true class; None without labeled clips.
        top1: Share of labeled clips that are right; None without them.
        kl: Mean KL divergence from what is said as it is, nats.
    """

    loss: float | None
    top1: float | None
    kl: float


@dataclass(frozen=True)
class Recovery:
    """The three ways."""

    original: Said
    reconstructed: Said
    ablated: Said

    def recovered(self, measure: str) -> float | None:
        """Of "loss", "top1" or "kl"; None where the measure is undefined, or ablation costs nothing."""
        values = [getattr(said, measure) for said in (self.original, self.reconstructed, self.ablated)]
        if any(value is None for value in values):
            return None
        original, reconstructed, ablated = values
        return ratio(reconstructed - ablated, original - ablated)


class Reconstruct:
    """A rewrite: x becomes x^."""

    def __init__(self, sae: SAE) -> None:
        self._sae = sae

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T', S, D]"""
        with torch.no_grad():
            clips = [self._sae(clip.float().flatten(0, 1)).view(clip.shape) for clip in tokens]
        return torch.stack(clips).to(tokens.dtype)


class MeanAblate:
    """A rewrite: x becomes one and the same vector."""

    def __init__(self, mean_D: Tensor) -> None:
        self._mean_D = mean_D

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T', S, D]"""
        return self._mean_D.to(tokens).expand_as(tokens)


def recover(session: BackboneSession, mean_D: Tensor) -> Recovery:
    """Run the clips of `session` in the three ways."""
    original = session.logits()
    reconstructed = session.logits(Reconstruct(session.sae))
    ablated = session.logits(MeanAblate(mean_D))
    return Recovery(*(said(original, logits, session.class_N) for logits in (original, reconstructed, ablated)))


def said(original_NC: Tensor, logits_NC: Tensor, class_N: NDArray[np.int64]) -> Said:
    """Measures of `logits_NC`; clips of class -1 count in the KL divergence only."""
    known = torch.from_numpy(class_N >= 0)
    truth, chosen = torch.from_numpy(class_N)[known], logits_NC[known].double()
    old, new = original_NC.double().log_softmax(1), logits_NC.double().log_softmax(1)
    return Said(
        loss=float(nnf.cross_entropy(chosen, truth)) if len(truth) else None,
        top1=float((chosen.argmax(1) == truth).double().mean()) if len(truth) else None,
        kl=max(0.0, float(nnf.kl_div(new, old, log_target=True, reduction="batchmean"))),
    )


def recovery(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """The figures; None without a readout."""
    if session.readout is None:
        return None
    found = recover(session, torch.from_numpy(clips.setting.store.moments(clips.setting.hook).mean).float())
    return ClipResult(_section(found, session, session.readout.description))


_MEASURES = (
    ("loss", "Cross-entropy", "Mean over labeled clips of -log p(true class)", "number", "low"),
    ("top1", "Top-1", "Share of labeled clips whose class is the most probable one", "percent", "high"),
    (
        "kl",
        "KL divergence",
        "Mean over clips of KL(classes as it is || classes now), in nats",
        "number",
        "low",
    ),
)


def _section(found: Recovery, session: BackboneSession, what: str) -> Section:
    labeled_clips = int((session.class_N >= 0).sum())
    figures = []
    for measure, title, definition, style, better in _MEASURES:
        count = len(session.class_N) if measure == "kl" else labeled_clips
        ways = (
            ("sae", "sae", title, found.reconstructed, "with the SAE's reconstruction on every patch token"),
            ("raw", "raw", title, found.original, "with the activations as they are"),
            ("mean", "sae", f"{title}, mean ablated", found.ablated, "with the mean activation on every patch token"),
        )
        figures += [
            Figure(
                name=f"recovery.{measure}.{name}",
                title=row,
                subject=subject,
                value=getattr(way, measure),
                n=count,
                n_of="clips",
                definition=f"{definition}, {how} at {session.hook}. Classes are read by {what}.",
                style=style,
                better=better,
            )
            for name, subject, row, way, how in ways
        ]
        figures.append(
            Figure(
                name=f"recovery.recovered_{measure}",
                title=f"Recovered, {title}",
                value=found.recovered(measure),
                n=count,
                n_of="clips",
                definition="(m(x̂) - m(mean)) / (m(x) - m(mean)) of the same measure m: 1 if the reconstruction does as "
                "well as the activation, 0 if no better than the mean. Above 1 and below 0 are possible. Undefined "
                "where the mean does as well as the activation.",
                style="percent",
                better="high",
                headline=measure == "kl",
            )
        )
    return Section(
        name="recovery",
        title="Downstream recovery",
        lead="Does the backbone still say the same of a clip when it goes on from what the SAE made of its activation? "
        f"Classes are read by {what}.",
        figures=tuple(figures),
        notes=(
            "Special tokens (CLS, registers) keep their own values: where classes are read from them, part of the "
            "answer bypasses the SAE, and the mean ablation leaves it in too.",
        ),
    )
