"""Monosemanticity: are the clips on which a latent fires alike, as judged by another model?

    a~_nj = (a_nj - min_n) / (max_n - min_n)                     activation of latent j on clip n, scaled to 0 ... 1
    s_nm  = cos(e_n, e_m)                                        likeness of two clips
    MS_j  = sum_{n<m} a~_nj a~_mj s_nm / sum_{n<m} a~_nj a~_mj   Pach et al. 2025, arXiv 2504.02821

With ||e_n|| = 1 both sums have a closed form, linear in the number of clips and exact:

    MS_j = ( ||sum_n a~_nj e_n||^2 - sum_n a~_nj^2 ) / ( (sum_n a~_nj)^2 - sum_n a~_nj^2 )

For a clip, a_nj is the largest (default) or mean code over its tokens. [RECON: the paper has images, not clips.]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.inputs.pooled_clips import Pooled, PooledSplit
from tubelet_lens.inputs.references import Reference, own_reference, read_reference
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Figure, Line, Section, Subject

# Latents at once: a float64 block of 10^5 clips is then 200 MB.
_LATENTS = 256


def monosemanticity(a_NF: NDArray[np.floating], e_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [F] MS of each latent over N clips, closed form.

    NaN where it is undefined: the latent is constant over the clips (dead among them), or no two clips share weight,
    because a~ is above 0 on one alone.

    Args:
        a_NF: Activations.
        e_NE: Embeddings of norm 1.
    """
    scores = np.full(a_NF.shape[1], np.nan)
    for start in range(0, a_NF.shape[1], _LATENTS):
        a = a_NF[:, start : start + _LATENTS].astype(np.float64)
        low = a.min(0)
        span = a.max(0) - low
        varies = span > 0
        a = (a[:, varies] - low[varies]) / span[varies]
        squares = (a * a).sum(0)
        weight = a.sum(0) ** 2 - squares
        shared = (a > 0).sum(0) > 1
        block = np.full(len(shared), np.nan)
        together = ((a[:, shared].T @ e_NE) ** 2).sum(1)
        block[shared] = (together - squares[shared]) / weight[shared]
        scores[start : start + _LATENTS][varies] = block
    return scores


def mean_cosine(e_NE: NDArray[np.float64]) -> float:
    """Mean cosine of two different clips: the expectation of every MS_j when the clips of a latent are permuted.

    A random permutation gives each pair of places every pair of clips alike, so the weights cancel.
    """
    clips = len(e_NE)
    return float(((e_NE.sum(0) ** 2).sum() - clips) / (clips * (clips - 1)))


_WORDS: dict[Subject, str] = {
    "sae": "latents of the SAE",
    "raw": "raw dimensions",
    "untrained": "latents of the SAE before training",
    "random_topk": "latents of a random projection with TopK",
}

_SUMMARIES = {"mean": "mean", "median": "median", "p95": "95% quantile", "max": "largest"}

FIGURES = FigureTable(
    "monosemanticity",
    FigureSpec(
        "summary",
        "Monosemanticity by {reference}, {statistic}",
        "The {statistic} over {units} for which it is defined. {definition}{signs}",
        n_of="{units}, of {of}",
        better="high",
        headline=True,
        null="monosemanticity.{summary}{suffix}.permuted",
        name="monosemanticity.{summary}{suffix}.{subject}",
    ),
    FigureSpec(
        "null_mean",
        "Monosemanticity by {reference}, {statistic}",
        "Null: the mean cosine of two different clips, which is what every latent (and every raw dimension) scores in "
        "expectation when each clip is given another clip's embedding at random. Range: lowest and highest mean of "
        "{draws} such draws. {definition}",
        n_of="latents",
        interval="lowest and highest of the draws",
        name="monosemanticity.{summary}{suffix}.permuted",
    ),
    FigureSpec(
        "null_quantile",
        "Monosemanticity by {reference}, {statistic}",
        "Null: the {statistic} over the SAE's latents when each clip is given another clip's embedding at random; "
        "mean, lowest and highest of {draws} draws. {definition}",
        n_of="latents",
        interval="lowest and highest of the draws",
        name="monosemanticity.{summary}{suffix}.permuted",
    ),
    FigureSpec(
        "above_null",
        "Monosemanticity by {reference}, above the null",
        "Mean MS less its null, the mean cosine of two evaluated clips ({floor:.4f}). {definition}",
        n_of="{units}",
        better="high",
        null="exact: 0 is the null itself",
        name="monosemanticity.above_null{suffix}{ending}",
    ),
    FigureSpec(
        "undefined",
        "Latents without a score by {reference}",
        "Latents that are left out of the figures above, because they are constant over the clips (dead ones among "
        "them) or fire on one clip alone.{signs}",
        n_of="latents",
        style="count",
        name="monosemanticity.undefined{suffix}",
    ),
)

_LEVELS = np.linspace(0, 1, 41)
"""Shares of latents at which the distribution is shown: the same of every SAE, so that curves can be laid over each
other, however narrow the values lie."""


@dataclass(frozen=True, eq=False)
class _Scores:
    """Monosemanticity by one reference.

    Attributes:
        floor: Mean cosine of two clips: the null, what a latent scores in expectation when clips are permuted.
        by_subject: float64 [units] MS of each subject's units, NaN where undefined.
        permuted: float64 [latents] One array per draw of such a permutation: how far chance spreads the scores.
    """

    reference: Reference
    floor: float
    by_subject: Mapping[Subject, NDArray[np.float64]]
    permuted: Sequence[NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class _Units:
    """What is scored of a subject: one unit per latent, or of signed codes two, z = z+ - z-."""

    a_NU: NDArray[np.float32]
    signed: bool

    def by_latent(self, scores_U: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score of each latent; of a signed one that of the sign with the larger sum of activations."""
        if not self.signed:
            return scores_U
        sums_U = self.a_NU.sum(0, dtype=np.float64)
        (up, down), (sum_up, sum_down) = np.split(scores_U, 2), np.split(sums_U, 2)
        return np.where(sum_up >= sum_down, up, down)


def measure_monosemanticity(clips: ClipSetting) -> ClipResult | None:
    """Monosemanticity by every reference; None for fewer than two clips.

    Raises:
        TubeletError: see `references.read_reference`.
    """
    side, config = clips.test, clips.config.monosemanticity
    if len(side.clips) < 2:
        return None
    references = [read_reference(one, side) for one in config.references]
    references.append(own_reference(side))
    # A neutral reference first, then any other model, then the backbone itself.
    head = next((r for r in references if r.neutral), references[0])
    units = _units(side, config.activation)
    rng = np.random.default_rng([clips.config.seed, 17])
    scores = [_score(reference, units, clips.config.null_draws, rng) for reference in references]
    scores.sort(key=lambda one: one.reference is not head)
    how = f"a_nj is the {'largest' if config.activation == 'max' else 'mean'} code over the clip's tokens"
    columns = []
    for one in scores:
        values_F = units["sae"].by_latent(one.by_subject["sae"])
        name, definition = one.reference.name, _definition(one.reference, how)
        definition += " Of a latent with codes of both signs: that of the sign with the larger sum."
        if one.reference is head:
            columns.append(LatentColumn("monosemanticity", values_F, definition))
        columns.append(LatentColumn(f"monosemanticity_{name}", values_F, definition))
    section = Section(
        name="monosemanticity",
        title="Monosemanticity",
        lead="Are the clips on which a latent fires alike, as judged by another model? "
        f"Judged by {_list(one.reference for one in scores)}.",
        figures=(*(figure for one in scores for figure in _figures(one, head, how, units)),),
        curves=tuple(_curve(one, head, how) for one in scores),
        notes=_notes(head, references, several_views=len(set(side.videos)) < len(side.clips)),
    )
    return ClipResult(section, tuple(columns))


def _units(side: PooledSplit, activation: Literal["max", "mean"]) -> dict[Subject, _Units]:
    units: dict[Subject, _Units] = {}
    for subject in _WORDS:
        pooled = side.pooled.get(subject)
        if pooled is not None:
            units[subject] = _Units(_activations(pooled, activation), pooled.negative is not None)
    return units


def _activations(pooled: Pooled, activation: Literal["max", "mean"]) -> NDArray[np.float32]:
    value_NF = pooled.max_NF if activation == "max" else pooled.mean_NF
    if pooled.negative is None:
        return value_NF
    below_NF = pooled.negative.max_NF if activation == "max" else pooled.negative.mean_NF
    # z+ = z + z- under a mean; under a maximum the largest z+ is the largest z, or 0 where all are negative.
    above_NF = np.maximum(value_NF, 0) if activation == "max" else value_NF + below_NF
    return np.concatenate([above_NF, below_NF], axis=1)


def _score(reference: Reference, units: Mapping[Subject, _Units], draws: int, rng: np.random.Generator) -> _Scores:
    places, e_ME = reference.places, reference.e_ME
    return _Scores(
        reference,
        mean_cosine(e_ME),
        {subject: monosemanticity(one.a_NU[places], e_ME) for subject, one in units.items()},
        [monosemanticity(units["sae"].a_NU[places], e_ME[rng.permutation(len(places))]) for _ in range(draws)],
    )


def _figures(scores: _Scores, head: Reference, how: str, units: Mapping[Subject, _Units]) -> Iterator[Figure]:
    reference = scores.reference
    words: dict[str, Any] = {
        "reference": reference.name,
        "suffix": "" if reference is head else f"_{reference.name}",
        "definition": _definition(reference, how),
        "draws": len(scores.permuted),
    }
    defined = {subject: int(np.isfinite(values).sum()) for subject, values in scores.by_subject.items()}
    for summary, statistic in _SUMMARIES.items():
        summarized: dict[str, Any] = {**words, "summary": summary, "statistic": statistic}
        for subject, values in scores.by_subject.items():
            yield FIGURES.fill(
                "summary",
                _summary(values, summary),
                defined[subject],
                subject=subject,
                headline=summary == "mean" and subject == "sae" and reference is head,
                units=_WORDS[subject],
                of=f"{len(values):,}",
                signs=_signs(units[subject]),
                **summarized,
            )
        drawn = [value for values in scores.permuted if (value := _summary(values, summary)) is not None]
        mean_of_draws, ends = spread(drawn)
        # A mean has an exact expectation, the floor; a quantile's has no closed form and is drawn.
        yield FIGURES.fill(
            "null_mean" if summary == "mean" else "null_quantile",
            scores.floor if drawn and summary == "mean" else mean_of_draws,
            int(np.isfinite(scores.permuted[0]).sum()),
            subject="permuted",
            ends=ends,
            **summarized,
        )
    for subject in ("sae", "raw"):
        mean = _summary(scores.by_subject[subject], "mean")
        yield FIGURES.fill(
            "above_null",
            None if mean is None else mean - scores.floor,
            defined[subject],
            subject=subject,
            ending="" if subject == "sae" else ".raw",
            units=_WORDS[subject],
            floor=scores.floor,
            **words,
        )
    values = scores.by_subject["sae"]
    yield FIGURES.fill("undefined", int(np.isnan(values).sum()), len(values), signs=_signs(units["sae"]), **words)


def _curve(scores: _Scores, head: Reference, how: str) -> Curve:
    reference = scores.reference
    shown: list[tuple[str, Subject, NDArray[np.float64]]] = [
        ("SAE", "sae", scores.by_subject["sae"]),
        ("raw dimensions", "raw", scores.by_subject["raw"]),
        ("clips permuted", "permuted", np.concatenate(scores.permuted)),
    ]
    lines = []
    for label, subject, values in shown:
        finite = values[np.isfinite(values)]
        at_levels = np.quantile(finite, _LEVELS).tolist() if len(finite) else [None] * len(_LEVELS)
        lines.append(Line(label=label, subject=subject, y=tuple(at_levels)))
    return Curve(
        name="monosemanticity.distribution" + ("" if reference is head else f"_{reference.name}"),
        title=f"Monosemanticity by {reference.name}",
        x_label="share of latents below",
        y_label="monosemanticity",
        x=tuple(_LEVELS.tolist()),
        lines=tuple(lines),
        definition="Quantiles of MS over the latents, over the raw dimensions, and over the latents under the permuted "
        f"null (its {len(scores.permuted)} draws together); undefined ones are left out. {_definition(reference, how)}",
    )


def _definition(reference: Reference, how: str) -> str:
    return (
        "MS_j = sum over pairs of clips n < m of a~_nj a~_mj s_nm / sum of a~_nj a~_mj (Pach et al. 2025); a~ is a "
        f"scaled to 0 ... 1 over the clips, {how}; s_nm is the cosine of the clips' embeddings, here "
        f"{reference.source}, over {len(reference.places):,} clips."
    )


def _signs(units: _Units) -> str:
    return " Codes of both signs are split, z = z+ - z-, and each sign counts." if units.signed else ""


def _summary(values: NDArray[np.float64], summary: str) -> float | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    if summary == "mean":
        return float(finite.mean())
    return float(np.quantile(finite, {"median": 0.5, "p95": 0.95, "max": 1.0}[summary]))


def _list(references: Iterator[Reference]) -> str:
    return "; ".join(f"{reference.name}: {reference.source}" for reference in references)


def _notes(head: Reference, references: Sequence[Reference], *, several_views: bool) -> tuple[str, ...]:
    floor = (
        "MS has a floor at the mean cosine of any two clips, whatever the latent does: read it above the null, and "
        "read the upper tail, since means hardly differ."
    )
    views = ("Several views of one video count as clips here; that they are alike raises MS.",) if several_views else ()
    if head.neutral:
        first = f"The headline is by {head.name}, a model that none of the compared SAEs reads."
    elif len(references) == 1:
        first = (
            "The only reference is the backbone's own embedding, which is biased: clips that are alike in the SAE's "
            "input count as alike. To compare backbones give a neutral reference (`monosemanticity.references`)."
        )
    else:
        first = (
            f"No reference is marked neutral, so the headline is by {head.name}. If it, or a model trained like it, is "
            "among the backbones that are compared, it favors that one."
        )
    return (first, floor, *views)
