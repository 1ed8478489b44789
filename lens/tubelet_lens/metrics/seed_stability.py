"""Stability between seeds: do SAEs that differ only in their seed find the same latents?

    runs ─▶ alive latents of each ─▶ one-to-one matching of every two ─▶ mean likeness, shares above 0.7 and 0.9

Latents are matched by the cosine of their directions, and over a store also by the correlation of their codes: two
latents may fire alike and point apart. Nulls: random directions; codes of one run against those of another clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_lens.codes.dictionary import directions, random_directions
from tubelet_lens.inputs.clip_selection import some_of
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.inputs.trained_sae import TrainedSae, check_store, load_trained
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import read_latents
from tubelet_lens.results.section import Figure, Subject
from tubelet_lens.stats.matching import Matching, cosines, match
from tubelet_store.reader import Store

_CLIPS = 64

_MATCHED = (
    "Of two SAEs that differ in their seed, latents are matched one to one so that the sum of their likenesses is "
    "largest (Hungarian assignment); then the {statistic}; mean, lowest and highest over every two seeds. Likeness: "
)


def _specs(kind: str, words: str, null: Subject) -> Iterator[FigureSpec]:
    """Rows of one likeness: of the seeds, and of its null."""
    for key, name, title, statistic, style in (
        ("mean", kind, f"Matched {words}", "mean likeness of the matched latents", "number"),
        ("above_07", f"{kind}_above_07", f"Matched above 0.7, by {words}", "share alike by more than 0.7", "percent"),
        ("above_09", f"{kind}_above_09", f"Matched above 0.9, by {words}", "share alike by more than 0.9", "percent"),
    ):
        figure = f"seeds.{name.removeprefix('cosine_')}"
        shared: dict[str, Any] = {
            "title": title,
            "definition": _MATCHED.format(statistic=statistic) + "{how}.",
            "style": style,
        }
        yield FigureSpec(
            f"{kind}_{key}",
            n_of="pairs of seeds",
            better="high",
            null=f"{figure}.{null}",
            interval="lowest and highest over every two seeds",
            name=figure,
            **shared,
        )
        yield FigureSpec(f"{kind}_{key}_null", n_of="draws", name=f"{figure}.{null}", **shared)


FIGURES = FigureTable(
    "seeds", *_specs("cosine", "cosine", "random"), *_specs("correlation", "correlation of codes", "permuted")
)


def seed_figures(
    runs: Sequence[Path],
    evaluations: Sequence[Path] | None = None,
    store: Store | None = None,
    limit_clips: int = _CLIPS,
) -> tuple[Figure, ...]:
    """How alike the dictionaries of `runs` are: means over every two of them.

    Args:
        runs: Two run folders or more.
        evaluations: Folders of their evaluations, in the same order: latents that never fired there are left out.
            None: all latents are compared.
        store: Correlate the codes over clips of this store too.
        limit_clips: At most this many of them, drawn at random.

    Raises:
        TubeletError: fewer than two runs; a run or an evaluation cannot be read; a run has fewer than two alive
            latents; `store` does not hold what they read.
    """
    if len(runs) < 2:
        raise TubeletError(f"Stability needs two runs or more, not {len(runs)}", "Train with another `seed` as well")
    trained = [load_trained(Path(run), "cpu") for run in runs]
    alive = [
        np.ones(sae.coder.latents, dtype=bool) if evaluations is None else _alive(evaluations[number])
        for number, sae in enumerate(trained)
    ]
    for sae, alive_F in zip(trained, alive, strict=True):
        if len(alive_F) != sae.coder.latents or alive_F.sum() < 2:
            raise TubeletError(
                f"{sae.folder}: {int(alive_F.sum())} of {len(alive_F)} latents are alive in its evaluation, the SAE "
                f"has {sae.coder.latents}",
                "Evaluate the run again, on clips on which it fires",
            )
    signed = all(sae.recipe["kind"] != "abstopk" for sae in trained)
    rows = [directions(sae.coder)[torch.from_numpy(kept)] for sae, kept in zip(trained, alive, strict=True)]
    matched = [match(cosines(one, other, signed)) for one, other in combinations(rows, 2)]
    sizes = sorted(len(part) for part in rows)[-2:]
    by_chance = [random_directions(size, rows[0].shape[1], seed) for seed, size in enumerate(sizes)]
    null = match(cosines(by_chance[0], by_chance[1], signed))
    likeness = "cosine of their directions in raw units" + ("" if signed else " (its size: codes have both signs)")
    who = "alive latents" if evaluations is not None else "all latents"
    figures = [
        *_figures("cosine", matched, f"{likeness}, {who}"),
        *_null_figures("cosine", null, "null: as many random directions of as many dimensions, one draw"),
    ]
    if store is not None:
        figures += _correlation_figures(trained, alive, store, limit_clips, signed)
    return tuple(figures)


def _alive(evaluation: Path) -> NDArray[np.bool_]:
    table = read_latents(evaluation)
    if "frequency" not in table.column_names:
        raise TubeletError(f"The latent table in {evaluation} has no `frequency`", "Evaluate without skipping sparsity")
    alive: NDArray[np.bool_] = table["frequency"].to_numpy() > 0
    return alive


def _correlation_figures(
    trained: Sequence[TrainedSae],
    alive: Sequence[NDArray[np.bool_]],
    store: Store,
    limit_clips: int,
    signed: bool,
) -> Iterator[Figure]:
    clips = np.flatnonzero(store.ok())
    clips = some_of(clips, limit_clips)
    for sae in trained:
        check_store(sae, store, other_store=True)
    codes = [_codes(sae, store, clips, kept) for sae, kept in zip(trained, alive, strict=True)]
    tokens = store.plan.grid.tokens
    # Half the clips on: another clip, whose neighbors in the store are not this one's.
    away = tokens * max(1, len(clips) // 2)
    rolled = np.roll(np.arange(codes[0].shape[0]), away)
    matched = [match(_correlations(one, other, signed)) for one, other in combinations(codes, 2)]
    null = match(_correlations(codes[0], codes[1][rolled], signed))
    over = f"Pearson correlation of their codes over {len(clips) * tokens:,} tokens"
    yield from _figures("correlation", matched, over)
    yield from _null_figures("correlation", null, f"null: {over}, the second's of another clip")


def _codes(
    sae: TrainedSae, store: Store, clips: NDArray[np.int64], alive_F: NDArray[np.bool_]
) -> scipy.sparse.csr_array:
    """[tokens, alive] of the clips, one after the other."""
    parts = []
    with torch.no_grad():
        for clip in clips:
            codes_NF = sae.coder.encode(read_clip(store, sae.hook, int(clip)).flatten(0, 1))
            parts.append(scipy.sparse.csr_array(codes_NF.numpy()[:, alive_F].astype(np.float64)))
    return scipy.sparse.vstack(parts, format="csr")


def _correlations(one: scipy.sparse.csr_array, other: scipy.sparse.csr_array, signed: bool) -> NDArray[np.float64]:
    """[A, B] Pearson; 0 where a latent does not vary over these tokens."""
    tokens = one.shape[0]
    means = [np.asarray(part.mean(axis=0)) for part in (one, other)]
    squares = [np.asarray(part.multiply(part).mean(axis=0)) for part in (one, other)]
    deviations = [np.sqrt(np.maximum(s - m**2, 0)) for s, m in zip(squares, means, strict=True)]
    together = np.asarray((one.T @ other).todense()) / tokens - np.outer(*means)
    scale = np.outer(*deviations)
    likeness_AB = np.divide(together, scale, out=np.zeros_like(together), where=scale > 0)
    return likeness_AB if signed else np.abs(likeness_AB)


def _figures(kind: Literal["cosine", "correlation"], matched: Sequence[Matching], how: str) -> Iterator[Figure]:
    for key, values in (
        ("mean", [one.mean for one in matched]),
        ("above_07", [one.above(0.7) for one in matched]),
        ("above_09", [one.above(0.9) for one in matched]),
    ):
        value, ends = spread(values)
        yield FIGURES.fill(f"{kind}_{key}", value, len(values), ends=ends, how=how)


def _null_figures(kind: Literal["cosine", "correlation"], null: Matching, how: str) -> Iterator[Figure]:
    for key, value in (("mean", null.mean), ("above_07", null.above(0.7)), ("above_09", null.above(0.9))):
        subject: Subject = "random" if kind == "cosine" else "permuted"
        yield FIGURES.fill(f"{kind}_{key}_null", value, 1, subject=subject, ends=(value, value), how=how)
