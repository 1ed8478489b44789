"""Ablation in the running backbone: latents switched off at the hook, the rest of the activation kept, the classes
read at the end (science note 1.8, level ii [RECON]).

    fit side's codes ─▶ probe ─▶ importance on its ranking part ─▶ ranking
    running backbone, test side: x' = x - sum over the set of f_j d_j ─▶ readout ─▶ accuracy
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.metrics.class_ranking import rank_latents, ranked
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.section import Curve, Figure, Section
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
    found = ablate(
        lambda latents: accuracy_without(session, latents),
        ranked(ranking.importance_F, alive_F),
        ranking.mean_F,
        sizes=sizes,
        draws=session.config.draws,
        chance=1 / len(session.readout.classes),
        rng=np.random.default_rng(clips.config.seed),
    )
    return ClipResult(_section(found, session, session.readout.description, int(alive_F.sum())))


def _section(found: Ablation, session: BackboneSession, what: str, alive: int) -> Section:
    count, draws, largest = int((session.class_N >= 0).sum()), session.config.draws, found.sizes[-1]
    how = (
        f"Latents are switched off (f' = 0) on every patch token at {session.hook} of the running backbone; what the "
        f"SAE does not explain stays. Classes are read by {what}. Latents are ranked by |w_cj| |E[z_j | c]| of a probe "
        "of the codes on the ranking part of the fit side, mean over its clips; accuracies are of test clips."
    )
    area = (
        "Mean over m = 1, 2, 4, ... of (accuracy before - accuracy without m latents) / (accuracy before - chance). "
        "Undefined where nothing is read above chance."
    )
    lost = found.random_areas
    return Section(
        name="backbone_ablation",
        title="Ablation in the running backbone",
        lead="How few latents does the backbone itself need to tell the classes apart? They are switched off where the "
        "SAE sits, and the rest of the backbone runs on from there.",
        figures=(
            Figure(
                name="backbone_ablation.before",
                title="Accuracy before",
                value=found.before,
                n=count,
                n_of="clips",
                definition=f"Top-1 with nothing switched off; chance {found.chance:.1%}. {how}",
                style="percent",
                better="high",
            ),
            Figure(
                name="backbone_ablation.m50",
                title="Latents that carry half (m_50), in the backbone",
                value=found.m_50,
                n=alive,
                n_of="alive latents",
                definition="Smallest m for which switching the m most important latents off costs half of (accuracy - "
                f"chance); undefined if {largest} do not. {how}",
                style="count",
                better="low",
                headline=True,
            ),
            Figure(
                name="backbone_ablation.area.sae",
                title="Area lost",
                value=found.area(found.top),
                n=count,
                n_of="clips",
                definition=f"The most important latents off. {area} {how}",
                better="high",
            ),
            Figure(
                name="backbone_ablation.area.random",
                title="Area lost",
                subject="random",
                value=float(np.mean(lost)) if lost else None,
                low=min(lost, default=None),
                high=max(lost, default=None),
                n=count,
                n_of="clips",
                definition="Random latents of the same mean activation off; mean, lowest and highest of "
                f"{draws} draws. {area}",
            ),
            Figure(
                name="backbone_ablation.area_bottom",
                title="Area lost with the least important latents",
                value=found.area(found.bottom),
                n=count,
                n_of="clips",
                definition=f"The alive latents of least importance off. {area}",
                better="low",
            ),
            Figure(
                name="backbone_ablation.match",
                title="Activity of the random latents, in that of the important ones",
                value=found.mismatch,
                n=draws,
                n_of="draws",
                definition=f"Mean activation of the {largest} random latents over that of the {largest} most "
                "important. Below 1 there were no others so active, and the comparison favors the important ones.",
            ),
        ),
        curves=(
            Curve(
                name="backbone_ablation.curve",
                title="Accuracy as latents are switched off in the backbone",
                x_label="latents off",
                y_label="top-1 of test clips",
                x=tuple(float(size) for size in found.sizes),
                lines=accuracy_lines(found),
                definition="Top-1 with the m most important latents off, with the m least important, and with m random "
                f"ones of the same mean activation (mean and range of {draws} draws). {how}",
                log_x=True,
            ),
        ),
        notes=(
            "A backbone may compute again later what was taken away: a small loss does not mean that the latents "
            "say nothing.",
        ),
    )
