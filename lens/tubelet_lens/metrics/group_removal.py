"""What a group of latents carries: the action probe on activations from which the group was removed.

    x' = x - sum over the group of z_j d_j     raw units; the error term x - decode(z) and all other latents stay
    fit side, test side ─▶ mean activations without the group ─▶ probe, refitted ─▶ top-1

Decoding is affine, so the edit of a mean over tokens is the mean of the edits: no second pass over the store, exactly.
The probe reads the mean of a clip's raw activations, as linear probes on a frozen backbone do (Ro, Choi & Kim 2026).
The control removes as many alive latents at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_lens.inputs.labeled_clips import Labeled
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.metric import ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.section import Figure
from tubelet_lens.stats.linear_models import choose_penalty, fit_probe

_TOP1 = (
    "Top-1 on test videos of a linear probe on the mean of a clip's raw activations x (fitted like the action probe, "
    "again each time)"
)
_EDIT = "x minus the group's part of the reconstruction; the error term and all other latents stay"

FIGURES = FigureTable(
    "scope",
    FigureSpec(
        "all",
        "Action probe on raw activations, all latents",
        f"{_TOP1}, nothing removed.",
        n_of="test videos",
        style="percent",
        name="scope.action.raw",
        when="labels on both sides, and two groups of latents",
    ),
    FigureSpec(
        "without",
        "Action probe without the {group} group",
        f"{_TOP1}, without the {{latents}} latents of the {{group}} group: {_EDIT}.",
        n_of="test videos",
        style="percent",
        null="scope.action_without_{group}.random",
        name="scope.action_without_{group}.raw",
        when="labels on both sides, and two groups of latents",
    ),
    FigureSpec(
        "without_random",
        "Action probe without the {group} group",
        f"Control: {_TOP1}, without as many alive latents at random, whatever their group; mean, lowest and highest of "
        f"{{draws}} draws. {_EDIT}.",
        n_of="test videos",
        style="percent",
        interval="lowest and highest of the draws",
        name="scope.action_without_{group}.random",
        when="labels on both sides, and two groups of latents",
    ),
)

# Rows edited at once.
_ROWS = 4096


def remove_latents(sae: SparseCoder, x_ND: Tensor, codes_NF: Tensor, group: NDArray[np.int64]) -> Tensor:
    """Raw activations [N, D], or their means over tokens, without what the latents `group` contribute.

    Args:
        sae: Made the codes.
        x_ND: Raw activations, in their own units.
        codes_NF: Their codes.
        group: Numbers of the latents.
    """
    alone_NF = torch.zeros_like(codes_NF)
    alone_NF[:, group] = codes_NF[:, group]
    with torch.no_grad():
        # The bias is in both, so it cancels.
        return x_ND - (sae.decode(alone_NF) - sae.decode(torch.zeros_like(alone_NF[:1])))


def remove_from_means(
    sae: SparseCoder,
    mean_ND: NDArray[np.float32],
    codes_NF: NDArray[np.float32],
    group: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """float32 [N, D] Mean raw activations of clips without the latents `group`.

    Args:
        sae: On `device`.
        mean_ND: Means of the raw activations over each clip's tokens.
        codes_NF: Means of their codes over the same tokens.
        group: Numbers of the latents.
        device: Where to decode.
    """
    edited = []
    for start in range(0, len(mean_ND), _ROWS):
        x_RD, z_RF = (torch.from_numpy(part[start : start + _ROWS]).to(device) for part in (mean_ND, codes_NF))
        edited.append(remove_latents(sae, x_RD, z_RF, group).cpu().numpy())
    return np.concatenate(edited)


def removal_figures(clips: ClipSetting, groups: Mapping[str, NDArray[np.int64]]) -> Iterator[Figure]:
    """Top-1 of the probe with all latents, and without each group; nothing where there are no labels on both sides.

    Args:
        clips: The evaluation.
        groups: Latents by name, which is part of the figure's name.
    """
    known, fit, parts = clips.labeled, clips.fit, clips.parts
    if known is None or fit is None or parts is None:
        return
    validation = parts.validation[known.fit_rows]

    def top1(group: NDArray[np.int64]) -> float:
        rows, test_rows = (_without(clips, side, group) for side in (fit, clips.test))
        return _top1(clips, known, validation, rows, test_rows)

    videos = len(known.video_class)
    yield FIGURES.fill("all", top1(np.array([], dtype=np.int64)), videos, subject="raw")
    alive = np.flatnonzero((clips.test.pooled["sae"].mean_NF != 0).any(0))
    rng = np.random.default_rng([clips.config.seed, 29])
    for name, group in groups.items():
        words: dict[str, Any] = {"group": name, "latents": f"{len(group):,}", "draws": clips.config.control_draws}
        yield FIGURES.fill("without", top1(group), videos, subject="raw", **words)
        value, ends = spread(
            [
                top1(rng.choice(alive, min(len(group), len(alive)), replace=False))
                for _ in range(clips.config.control_draws)
            ]
        )
        yield FIGURES.fill("without_random", value, videos, subject="random", ends=ends, **words)


def _without(clips: ClipSetting, side: PooledSplit, group: NDArray[np.int64]) -> NDArray[np.float32]:
    raw, codes = side.pooled["raw"], side.pooled["sae"]
    if not len(group):
        return raw.mean_NF
    return remove_from_means(clips.sae, raw.mean_NF, codes.mean_NF, group, clips.setting.device)


def _top1(
    clips: ClipSetting,
    known: Labeled,
    validation: NDArray[np.bool_],
    rows_ND: NDArray[np.float32],
    test_ND: NDArray[np.float32],
) -> float:
    fit_rows, penalties = rows_ND[known.fit_rows], clips.config.action.penalties
    penalty = choose_penalty(fit_rows, known.fit_class, validation, known.classes, penalties)
    probe = fit_probe(fit_rows, known.fit_class, known.classes, penalty)
    predicted_V = known.by_video(probe.probabilities(test_ND[known.test_rows])).argmax(1)
    return float((predicted_V == known.video_class).mean())
