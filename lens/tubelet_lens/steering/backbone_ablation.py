"""Ablation in the backbone: latents are switched off at the hook, the rest of the activation is kept, and the accuracy
of the readout is measured.

[RECON] The paper on spatio-temporal SAEs does not say whether it ablates the code or the backbone. `code_ablation`
measures the first, this the second.

    fit side's codes ─▶ probe ─▶ importance on its ranking part ─▶ ranking
    backbone, test side: x' = x - sum over the set of f_j d_j ─▶ readout ─▶ accuracy
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.metrics.class_ranking import rank_latents, ranked
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.section import Curve, Section
from tubelet_lens.stats.ablation_curve import Ablation, ablate, accuracy_lines, set_sizes
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.operations import Suppress


def accuracy_without(session: BackboneSession, latents: NDArray[np.int64]) -> float:
    """Top-1 of the labeled clips with `latents` switched off on every patch token."""
    edits = LatentEdits(session.sae, [Edit(int(latent), Suppress()) for latent in latents])
    predicted = session.logits(edits).argmax(1).numpy()
    known = session.class_N >= 0
    return float((predicted == session.class_N)[known].mean())


def backbone_ablation(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """Curves and m_50; None without labels on both sides, or with fewer than two live latents."""
    if session.readout is None or not (session.class_N >= 0).any():
        return None
    ranking = rank_latents(clips)
    if ranking is None:
        return None
    alive_F = ranking.alive_F
    sizes = set_sizes(int(alive_F.sum()), session.config.largest)
    if not sizes:
        return None
    ablation = ablate(
        lambda latents: accuracy_without(session, latents),
        ranked(ranking.importance_F, alive_F),
        ranking.mean_F,
        sizes=sizes,
        draws=session.config.draws,
        chance=1 / len(session.readout.classes),
        rng=np.random.default_rng(clips.config.seed),
    )
    return ClipResult(_section(ablation, session, session.readout.description, int(alive_F.sum())))


_AREA = (
    "Mean over m = 1, 2, 4, ... of (accuracy before - accuracy without m latents) / (accuracy before - chance). "
    "Undefined where the accuracy before is not above chance."
)

FIGURES = FigureTable(
    "backbone_ablation",
    FigureSpec(
        "before",
        "Accuracy before",
        "Top-1 with nothing switched off; chance {chance}. {how}",
        n_of="clips",
        style="percent",
        better="high",
        null="exact: chance, in the definition",
    ),
    FigureSpec(
        "m50",
        "Latents that carry half (m_50), in the backbone",
        "Smallest m for which switching the m most important latents off costs half of (accuracy - chance); undefined "
        "if {largest} do not. {how}",
        n_of="alive latents",
        style="count",
        better="low",
        headline=True,
        null="backbone_ablation.area.random",
    ),
    FigureSpec(
        "area",
        "Area lost",
        f"The most important latents off. {_AREA} {{how}}",
        n_of="clips",
        better="high",
        null="backbone_ablation.area.random",
        name="backbone_ablation.area.sae",
    ),
    FigureSpec(
        "area_random",
        "Area lost",
        f"Random latents of the same mean activation off; mean, lowest and highest of {{draws}} draws. {_AREA}",
        n_of="clips",
        interval="lowest and highest of the draws",
        name="backbone_ablation.area.random",
    ),
    FigureSpec(
        "area_bottom",
        "Area lost with the least important latents",
        f"The alive latents of least importance off. {_AREA}",
        n_of="clips",
        better="low",
        null="backbone_ablation.area.random",
    ),
    FigureSpec(
        "match",
        "Activity of the random latents, relative to the important ones",
        "Mean activation of the {largest} random latents over that of the {largest} most important. Below 1 there were "
        "no others so active, and the comparison favors the important ones.",
        n_of="draws",
    ),
)


def _section(ablation: Ablation, session: BackboneSession, readout: str, alive: int) -> Section:
    count, draws, largest = int((session.class_N >= 0).sum()), session.config.draws, ablation.sizes[-1]
    how = (
        f"Latents are switched off (f' = 0) on every patch token at {session.hook} of the running backbone; what the "
        f"SAE does not explain stays. Classes are read by {readout}. Latents are ranked by |w_cj| |E[z_j | c]| of a "
        "probe of the codes on the ranking part of the fit side, mean over its clips; accuracies are of test clips."
    )
    words: dict[str, Any] = {"how": how, "largest": largest, "draws": draws, "chance": f"{ablation.chance:.1%}"}
    random_area, ends = spread(ablation.random_areas)
    return Section(
        name="backbone_ablation",
        title="Ablation in the backbone",
        lead="How few latents does the backbone itself need to tell the classes apart? They are switched off at the "
        "SAE's hook, and the rest of the backbone runs on the result.",
        figures=(
            FIGURES.fill("before", ablation.before, count, **words),
            FIGURES.fill("m50", ablation.m_50, alive, **words),
            FIGURES.fill("area", ablation.area(ablation.top), count, **words),
            FIGURES.fill("area_random", random_area, count, subject="random", ends=ends, **words),
            FIGURES.fill("area_bottom", ablation.area(ablation.bottom), count),
            FIGURES.fill("match", ablation.mismatch, draws, **words),
        ),
        curves=(
            Curve(
                name="backbone_ablation.curve",
                title="Accuracy as latents are switched off in the backbone",
                x_label="latents off",
                y_label="top-1 of test clips",
                x=tuple(float(size) for size in ablation.sizes),
                lines=accuracy_lines(ablation),
                definition="Top-1 with the m most important latents off, with the m least important, and with m random "
                f"ones of the same mean activation (mean and range of {draws} draws). {how}",
                log_x=True,
            ),
        ),
        notes=(
            "Later blocks may recompute what was removed: a small loss does not show that the latents carry nothing.",
        ),
    )
