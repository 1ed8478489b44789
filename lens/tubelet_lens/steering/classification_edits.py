"""Classification edits: which clips change their predicted class when the latent of a class is suppressed
(Stevens et al., arXiv 2502.06755, section on classification).

    fit side   latent of a class = argmax F1 of "its mean activation in the clip is above a threshold"
    test side  the latent suppressed on every patch token ─▶ predictions of the readout that change

[RECON] Thresholds are quantiles of each latent's mean activation over the fit side's clips. saev uses thresholds near 0
on images of one object; in a clip nearly every latent fires on some patch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import spread
from tubelet_lens.results.section import Section
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_lens.steering.class_edits import class_edit_section, edit_classes, edit_table
from tubelet_lens.steering.readout import match_class_names, unknown_names
from tubelet_pipeline.backbones.rewrite import Rewrite

QUANTILES = (0.5, 0.75, 0.9, 0.95)

_NAME = "classification_edits"

FIGURES = edit_table(_NAME, "clips")

_TITLE = "Classification edits"
_LEAD = "Does suppressing the latent of a class in the backbone change the predictions of that class, and only these?"


def best_latents(codes_NF: NDArray[np.float32], class_N: NDArray[np.int64]) -> dict[int, tuple[int, float]]:
    """Latent of each class and its F1, over thresholds at `QUANTILES` of each latent's values.

    Args:
        codes_NF: Mean code of each clip.
        class_N: Its class.
    """
    classes = np.unique(class_N)
    truth_NC = class_N[:, None] == classes
    f1 = []
    for level in QUANTILES:
        above_NF = codes_NF > np.quantile(codes_NF, level, axis=0)
        hits_FC = above_NF.T.astype(np.float64) @ truth_NC
        f1.append(2 * hits_FC / np.maximum(above_NF.sum(0)[:, None] + truth_NC.sum(0), 1))
    f1_FC = np.max(f1, axis=0)
    chosen = f1_FC.argmax(axis=0)
    return {
        int(number): (int(chosen[place]), float(f1_FC[chosen[place], place]))
        for place, number in enumerate(classes)
        if f1_FC[chosen[place], place] > 0
    }


def classification_edits(clips: ClipSetting, session: BackboneSession) -> ClipResult | None:
    """The rates; None without a readout or labels on the fit side."""
    known = clips.labeled
    if session.readout is None or known is None or clips.fit is None:
        return None
    pooled, readout = clips.fit.pooled["sae"], session.readout
    place, unknown = match_class_names(known.names, readout.classes), unknown_names(known.names, readout.classes)
    if not place:
        note = f"No class could be edited, and the accuracy of the backbone is unknown. {unknown}"
        return ClipResult(Section(name=_NAME, title=_TITLE, lead=_LEAD, notes=(note,)))
    best = {
        place[known.names[number]]: latent_and_f1
        for number, latent_and_f1 in best_latents(pooled.mean_NF[known.fit_rows], known.fit_class).items()
        if known.names[number] in place
    }
    if not best:
        return None

    def predict(rewrite: Rewrite | None) -> NDArray[np.int64]:
        predicted: NDArray[np.int64] = session.logits(rewrite).argmax(1).numpy()
        return predicted

    edits = edit_classes(
        predict,
        session.sae,
        {number: latent for number, (latent, _) in best.items()},
        largest_F=pooled.max_NF.max(axis=0).astype(np.float64),
        mean_F=np.abs(pooled.mean_NF).mean(axis=0, dtype=np.float64),
        strengths=session.config.strengths,
        draws=session.config.control_draws,
        seed=clips.config.seed,
    )
    chosen = ", ".join(f"{readout.classes[number]}: {latent}" for number, (latent, _) in best.items())
    levels = ", ".join(f"{level:.0%}" for level in QUANTILES)
    how = (
        f"Clips are classified by {readout.description}. The latent of a class has the largest F1 on the fit side of a "
        f"threshold on its mean activation in a clip, thresholds at its {levels} quantiles ({chosen})."
    )
    f1, ends = spread([f1 for _, f1 in best.values()])
    section = class_edit_section(
        edits,
        table=FIGURES,
        title=_TITLE,
        lead=_LEAD,
        how=how,
        extra=(FIGURES.fill("f1", f1, len(best), ends=ends, how=how),),
    )
    if unknown is not None:
        section = section.model_copy(update={"notes": (*section.notes, f"Left out: {unknown}")})
    return ClipResult(section)
