"""Effects of single latents on the backbone's classes: each is switched off alone.

    fit side's probe ─▶ the most important latents
    backbone, test side: x' = x - f_j d_j ─▶ readout ─▶ mean change of each class's logit, against a random
    direction with steps of the same length

The rows become `effects.parquet`, which the gallery shows on the pages of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.metrics.class_ranking import rank_latents, ranked
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import LatentEffect
from tubelet_lens.results.section import Section
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_lens.steering.edit_controls import RandomDirection
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.operations import Suppress
from tubelet_pipeline.backbones.rewrite import Rewrite


@dataclass(frozen=True, eq=False)
class LatentChange:
    """Effect of switching one latent off.

    Attributes:
        latent: Its number.
        own_C: float64 Mean change of each class's logit when it is switched off, over the clips on which it fires.
        random_C: float64 The same for steps of equal length along a random direction.
        clips: Number of clips on which it fires.
    """

    latent: int
    own_C: NDArray[np.float64]
    random_C: NDArray[np.float64]
    clips: int


def changes(
    session: BackboneSession, fires_NL: NDArray[np.bool_], latents: NDArray[np.int64], seed: int
) -> list[LatentChange]:
    """Switch each of `latents` off on every patch token of the clips of `session`.

    Args:
        session: With a readout.
        fires_NL: Clips on which each latent fires; one that fires on none is left out.
        latents: [L]
        seed: Seed of the directions.
    """
    before = session.logits()

    def change(rewrite: Rewrite, chosen_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        moved: Tensor = session.logits(rewrite).double() - before.double()
        mean_C: NDArray[np.float64] = moved.numpy()[chosen_N].mean(0)
        return mean_C

    measured = []
    for latent, fires_N in zip(latents.tolist(), fires_NL.T, strict=True):
        if fires_N.any():
            off = LatentEdits(session.sae, [Edit(latent, Suppress())])
            random = RandomDirection(off, seed * 1_000_003 + latent)
            measured.append(LatentChange(latent, change(off, fires_N), change(random, fires_N), int(fires_N.sum())))
    return measured


def latent_effects(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """The section and the rows; None without a readout or a latent that fires."""
    if session.readout is None or not session.config.effects:
        return None
    codes_NF = clips.test.pooled["sae"].mean_NF[session.rows]
    ranking = rank_latents(clips)
    if ranking is not None:
        order, which = (
            ranked(ranking.importance_F, ranking.alive_F),
            "most important to a probe of the codes among those that fire there",
        )
    else:
        size_F = np.abs(codes_NF).mean(axis=0, dtype=np.float64)
        order, which = ranked(size_F, size_F > 0), "most active there"
    latents = order[(codes_NF[:, order] != 0).any(axis=0)][: session.config.effects]
    measured = changes(session, codes_NF[:, latents] != 0, latents, clips.config.seed)
    if not measured:
        return None
    rows = [
        row
        for change in measured
        for row in _rows(change, session, session.readout.description, session.readout.classes)
    ]
    return ClipResult(_section(measured, session, session.readout.description, which), effects=tuple(rows))


def _rows(change: LatentChange, session: BackboneSession, what: str, classes: tuple[str, ...]) -> list[LatentEffect]:
    definition = (
        f"Switched off (f' = 0) on every patch token at {session.hook} of the backbone, with the SAE's error kept: "
        "mean "
        f"change of the class's logit over the {change.clips:,} of {len(session.rows):,} test clips "
        f"on which the latent fires. Classes are read by {what}. Steps of the same length along a random direction "
        f"change no class's logit by more than {np.abs(change.random_C).max():.3g}."
    )
    return [
        LatentEffect(change.latent, name, float(effect), definition)
        for name, effect in zip(classes, change.own_C, strict=True)
    ]


_LARGEST = (
    "Of each latent the largest |mean change| among the classes' logits, over those of {clips} test clips on which it "
    "fires; mean, lowest and highest over the {latents} latents that are {which}. Each is switched off alone (f' = 0) "
    "on every patch token at {hook}. Classes are read by {readout}."
)

FIGURES = FigureTable(
    "effects",
    FigureSpec(
        "largest",
        "Largest change of a logit",
        _LARGEST,
        n_of="latents",
        null="effects.largest.random",
        interval="lowest and highest over the latents",
        name="effects.largest.sae",
    ),
    FigureSpec(
        "largest_random",
        "Largest change of a logit",
        f"The same for steps as long as the latent's on every token, in a random direction. {_LARGEST}",
        n_of="latents",
        interval="lowest and highest over the latents",
        name="effects.largest.random",
    ),
)


def _section(measured: list[LatentChange], session: BackboneSession, readout: str, which: str) -> Section:
    words: dict[str, Any] = {"clips": f"{len(session.rows):,}", "latents": f"{len(measured):,}", "which": which}
    words |= {"hook": session.hook, "readout": readout}
    own, ends = spread([float(np.abs(change.own_C).max()) for change in measured])
    random, random_ends = spread([float(np.abs(change.random_C).max()) for change in measured])
    return Section(
        name="effects",
        title="Effects of single latents",
        lead="How far does a class's logit move when one latent is switched off in the running backbone? The gallery "
        "shows it latent by latent.",
        figures=(
            FIGURES.fill("largest", own, len(measured), ends=ends, **words),
            FIGURES.fill("largest_random", random, len(measured), subject="random", ends=random_ends, **words),
        ),
    )
