"""Information scope of an evaluation: CDS in space and in time, two groups of latents, and the probe without each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet_lens.inputs.clip_selection import choose_clips
from tubelet_lens.inputs.shifted_pairs import Axis, ShiftedPairs, shifted_pairs
from tubelet_lens.inputs.trained_sae import check_store
from tubelet_lens.metrics.contextual_dependency import Scope, Split, measure_scope, otsu
from tubelet_lens.metrics.group_removal import removal_figures
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Figure, Line, Section, Subject, ratio
from tubelet_store.reader import Store, open_store

_BINS = 40

_PLACE = {"spatial": "space", "temporal": "time"}

_NULL = "Null: M1 of each of a latent's pairs against M2 of its next one of another video. "
_CUT = "cut where the variance within both groups is least (Otsu, over all possible cuts)"

FIGURES = FigureTable(
    "scope",
    FigureSpec(
        "mean",
        "Scope in {place}, mean",
        "The mean of CDS over the latents for which it is defined. {how}",
        n_of="latents of {latents}",
        headline=True,
        null="scope.{axis}.permuted",
        name="scope.{axis}.{subject}",
    ),
    FigureSpec(
        "median",
        "Scope in {place}, median",
        "The median of CDS over the latents for which it is defined. {how}",
        n_of="latents of {latents}",
        null="scope.{axis}_median.permuted",
        name="scope.{axis}_median.{subject}",
    ),
    FigureSpec(
        "mean_permuted",
        "Scope in {place}, mean",
        _NULL + "The mean of CDS over the latents for which it is defined. {how}",
        n_of="latents of {latents}",
        name="scope.{axis}.{subject}",
    ),
    FigureSpec(
        "median_permuted",
        "Scope in {place}, median",
        _NULL + "The median of CDS over the latents for which it is defined. {how}",
        n_of="latents of {latents}",
        name="scope.{axis}_median.{subject}",
    ),
    FigureSpec(
        "vanished",
        "Vanished in {place}",
        "Share of the latents' strongest pairs in which the latent fires in one view only. {how}",
        n_of="pairs of views of all latents",
        style="percent",
        better="low",
        name="scope.{axis}_vanished",
    ),
    FigureSpec(
        "threshold",
        "Scope in {place}, threshold",
        f"Threshold between latents of low and of high scope: {_CUT}. Undefined where CDS does not vary. {{how}}",
        n_of="latents",
        name="scope.{axis}_threshold",
    ),
    FigureSpec(
        "separation",
        "Scope in {place}, separation of the groups",
        f"Share of the variance of CDS between the groups, {_CUT}. 1: two values; an even spread still gives "
        "0.75. {how}",
        n_of="latents",
        style="percent",
        null="exact: an even spread gives 75 %",
        name="scope.{axis}_separation",
    ),
    FigureSpec(
        "high",
        "Latents of high scope in {place}",
        f"Share of latents above the threshold: {_CUT}. {{how}}",
        n_of="latents",
        style="percent",
        name="scope.{axis}_high",
    ),
)


def measure_information_scope(clips: ClipSetting) -> ClipResult | None:
    """CDS along every axis in which the store has shifted views; None where it has none.

    Raises:
        TubeletError: `scope.store` is not of the SAE's backbone and hook, or has no shifted views that overlap.
    """
    config = clips.config.scope
    store = _store(clips)
    videos = _videos(clips, store)
    figures: list[Figure] = []
    curves: list[Curve] = []
    columns: list[LatentColumn] = []
    axes: tuple[Axis, ...] = ("spatial", "temporal")
    for axis in axes:
        pairs = shifted_pairs(store, axis, videos, config.limit_pairs)
        if pairs is None or not pairs.pairs:
            continue
        scope = _measure(clips, store, pairs)
        split = otsu(scope.cds_F)
        how = _how(clips, pairs)
        figures += _figures(scope, split, how)
        curves.append(_curve(scope, split, how))
        columns += _columns(scope, how)
        if axis == "spatial" and split is not None:
            figures += removal_figures(clips, _groups(scope, split))
    if not figures:
        if config.store is None:
            return None
        raise TubeletError(
            f"{config.store} has no shifted views of the evaluated videos that overlap in more than one place",
            "Extract with `views.kind: shifted`, the same data set and split",
        )
    section = Section(
        name="scope",
        title="Information scope",
        lead="When the view shifts, does a latent follow the content (low: local), or does what else is in view "
        "decide "
        "where it fires (high: global)?",
        figures=tuple(figures),
        curves=tuple(curves),
        notes=(
            "A latent that fires in one view and not in the other has vanished there: that rate belongs to the figure.",
            "In time, a backbone that sees one frame at a time has scope 0 exactly, whatever its latents are.",
        ),
    )
    return ClipResult(section, tuple(columns))


def _groups(scope: Scope, split: Split) -> dict[str, NDArray[np.int64]]:
    with np.errstate(invalid="ignore"):
        return {
            "high": np.flatnonzero(scope.cds_F > split.threshold),
            "low": np.flatnonzero(scope.cds_F <= split.threshold),
        }


def _store(clips: ClipSetting) -> Store:
    named = clips.config.scope.store
    if named is None:
        return clips.setting.store
    store = open_store(named)
    check_store(clips.trained, store, other_store=True)
    return store


def _videos(clips: ClipSetting, store: Store) -> list[str]:
    """Videos of `store` on the side of the split that is evaluated."""
    chosen = choose_clips(store, clips.config.split, clips.trained.holdout, None)
    return store.clips()["video_id"].take(chosen).to_pylist()


def _measure(clips: ClipSetting, store: Store, pairs: ShiftedPairs) -> Scope:
    config = clips.config.scope
    with Progress(f"scope in {_PLACE[pairs.axis]}", 2 * len(pairs.pairs), "pairs of views") as progress:
        return measure_scope(
            store,
            clips.setting.hook,
            clips.sae,
            pairs,
            clips=config.clips,
            vanished=config.vanished,
            device=clips.setting.device,
            progress=progress.advance,
        )


def _how(clips: ClipSetting, pairs: ShiftedPairs) -> str:
    config, grid = clips.config.scope, pairs.grid
    if pairs.axis == "spatial":
        moved = f"one is {pairs.shift} patches further down and right"
        maps = "maps of |z_j| over the patches of the latent step where it is largest"
        largest = f"the diagonal of the overlap of {grid.height} x {grid.width} patches, {pairs.largest:.3g}"
    else:
        moved = f"one begins {pairs.shift} latent steps later"
        maps = "profiles of |z_j| through time, its mean over patches"
        largest = f"the number of steps of the overlap less one, {pairs.largest:.0f}"
    counted = "left out of the mean" if config.vanished == "left_out" else "counted as 1"
    return (
        f"CDS_j = mean over the {config.clips} pairs of views on which latent j is largest of EMD(M1, M2) / D. Of "
        "the two "
        f"views {moved}; M1 and M2 are {maps}, on what both views show, each in its own coordinates, of sum 1; EMD "
        "is the "
        f"earth mover's distance and D {largest}. Pairs in which j fires in one view only are {counted}. "
        f"{len(pairs.pairs):,} pairs of views, {pairs.unusable:,} unusable (a view failed, or frames differ or repeat)."
    )


def _figures(scope: Scope, split: Split | None, how: str) -> Iterator[Figure]:
    words: dict[str, Any] = {
        "axis": scope.axis,
        "place": _PLACE[scope.axis],
        "how": how,
        "latents": f"{len(scope.cds_F):,}",
    }
    shown: tuple[tuple[str, Subject, NDArray[np.float64]], ...] = (
        ("", "sae", scope.cds_F),
        ("_permuted", "permuted", scope.null_F),
    )
    for suffix, subject, values_F in shown:
        finite = values_F[np.isfinite(values_F)]
        for name, value in (("mean", np.mean), ("median", np.median)):
            scored = float(value(finite)) if len(finite) else None
            yield FIGURES.fill(name + suffix, scored, len(finite), subject=subject, **words)
    pairs_seen, vanished = int(scope.pairs_F.sum()), int(scope.vanished_F.sum())
    yield FIGURES.fill("vanished", ratio(vanished, pairs_seen), pairs_seen, **words)
    finite = scope.cds_F[np.isfinite(scope.cds_F)]
    yield FIGURES.fill("threshold", split.threshold if split else None, len(finite), **words)
    yield FIGURES.fill("separation", split.separation if split else None, len(finite), **words)
    yield FIGURES.fill("high", float((finite > split.threshold).mean()) if split else None, len(finite), **words)


def _curve(scope: Scope, split: Split | None, how: str) -> Curve:
    edges = np.linspace(0, 1, _BINS + 1)
    shown: tuple[tuple[str, Subject, NDArray[np.float64]], ...] = (
        ("SAE", "sae", scope.cds_F),
        ("maps of different videos", "permuted", scope.null_F),
    )
    lines = []
    for label, subject, values_F in shown:
        counts, _ = np.histogram(np.minimum(values_F[np.isfinite(values_F)], 1), bins=edges)
        lines.append(Line(label=label, subject=subject, y=tuple(float(count) for count in counts)))
    cut = f" The threshold between low and high is {split.threshold:.3f}." if split else ""
    return Curve(
        name=f"scope.{scope.axis}_distribution",
        title=f"Scope in {_PLACE[scope.axis]}",
        x_label="CDS",
        y_label="latents",
        x=tuple(float(value) for value in (edges[:-1] + edges[1:]) / 2),
        lines=tuple(lines),
        definition=f"Latents in each of {_BINS} bins of CDS, next to the null.{cut} {how}",
    )


def _columns(scope: Scope, how: str) -> tuple[LatentColumn, ...]:
    with np.errstate(invalid="ignore"):
        vanished_F = scope.vanished_F / scope.pairs_F
    return (
        LatentColumn(f"scope_{scope.axis}", scope.cds_F, how),
        LatentColumn(
            f"scope_{scope.axis}_vanished",
            vanished_F,
            f"Share of the latent's strongest pairs of views in which it fires in one view only. {how}",
        ),
    )
