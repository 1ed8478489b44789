"""Temporal coherence of codes and of raw activations: how stable they are from one latent step to the next.

    headline   pooled lag-1 autocorrelation of the codes, next to that of the raw dimensions
    null       time shuffled within each clip: what is left is the difference between clips and patches
    drop       (raw - SAE) / raw

[RECON] The paper that reports a drop of 36 % does not define its autocorrelation; the definitions here are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tubelet_lens.codes.series import FeatureProducts, Series, pairs_at_lags, patch_products, shuffled_steps
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.metrics.metric import Setting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Curve, Figure, Line, Section, Subject
from tubelet_lens.stats.step_pairs import (
    PooledAutocorrelation,
    PooledValue,
    StepCosine,
    SupportOverlap,
    WithinAutocorrelation,
)

_PAIRS = "Pairs in which either step covers a repeated (padding) frame are left out."

_LAG1 = (
    "Per {{unit}}: Pearson correlation over all pairs of tokens one latent step apart (same clip, same patch), pooled "
    "over clips, steps and patches ({{pairs}} pairs); then the {summary} over the {{unit}}s {weights}for which it is "
    f"defined, that is which vary over the pairs. {_PAIRS}"
)
_SHUFFLED = (
    "Null: the same statistic with the latent steps of each clip in random order (one order per clip, shared by all "
    "patches and features, seed {seed}); mean, lowest and highest of {draws} draws. What is left is the difference "
    "between clips and between patches. "
)
_ONE_DRAW = "Null: the same with the steps of each clip in random order (one draw). "
_COSINE = (
    "Mean over pairs of tokens one latent step apart of the cosine of their vectors, no mean subtracted; pairs with a "
    f"zero vector are left out. {_PAIRS}"
)
_JACCARD = (
    "Mean over pairs one latent step apart of |A and B| / |A or B|, where A and B are the sets of active latents; "
    f"pairs in which both are empty are left out. {_PAIRS}"
)
_FLIP = (
    "Mean over pairs one latent step apart of 1 - |A and B| / |A|: the share of a token's active latents that are off "
    "one step later; pairs in which the earlier token has none are left out. Where k latents are active on every "
    f"token, |A| = k; where the count varies, |A| is the token's own. {_PAIRS}"
)
_STEP = "Median over clips of the distance between neighboring latent steps, repeated frames left out"


def _lag1(key: str, title: str, summary: str, weights: str = "") -> Iterator[FigureSpec]:
    """A pooled lag-1 figure and its null."""
    definition, name = _LAG1.format(summary=summary, weights=weights), f"coherence.{key}.{{subject}}"
    yield FigureSpec(
        key,
        title,
        definition,
        n_of="{unit}s of {of}",
        better="high",
        headline=key == "lag1",
        null=f"coherence.{key}.{{subject}}_shuffled",
        name=name,
    )
    yield FigureSpec(
        f"{key}_null",
        title,
        _SHUFFLED + definition,
        n_of="{unit}s of {of}",
        interval="lowest and highest of the draws",
        name=name,
    )


def _step(key: str, title: str, definition: str, better: Literal["high", "low"], style: str) -> Iterator[FigureSpec]:
    """A figure of pairs of steps and its null."""
    name, null = f"coherence.{key}.{{subject}}", f"coherence.{key}.{{subject}}_shuffled"
    shared: dict[str, Any] = {"n_of": "pairs of tokens", "style": style, "name": name}
    yield FigureSpec(key, title, definition, better=better, null=null, **shared)
    yield FigureSpec(f"{key}_null", title, _ONE_DRAW + definition, **shared)


FIGURES = FigureTable(
    "coherence",
    *_lag1("lag1", "Pooled lag-1 autocorrelation", "mean"),
    *_lag1("lag1_median", "Pooled lag-1, median", "median"),
    *_lag1(
        "lag1_weighted",
        "Pooled lag-1, weighted by activity",
        "mean",
        "(each weighted by the number of tokens on which it is active) ",
    ),
    FigureSpec(
        "drop",
        "Drop in coherence, raw to SAE",
        "(raw - SAE) / raw of the pooled lag-1 autocorrelation (means over features). Positive: the code is less "
        "coherent than what it encodes; negative: more. Undefined where raw is not above 0.",
        n_of="pairs of tokens",
        style="percent",
        better="low",
        headline=True,
        null="exact: 0 is the coherence of the raw activations",
    ),
    FigureSpec(
        "drop_weighted",
        "Drop, weighted by activity",
        "The same drop of the activity-weighted means: latents that fire often count more.",
        n_of="pairs of tokens",
        style="percent",
        better="low",
    ),
    FigureSpec(
        "drop_above_null",
        "Drop above the null",
        "(R - C) / R with R = raw - shuffled raw and C = SAE - shuffled SAE: the drop in the part of coherence that "
        "depends on the order of time. Undefined where R is not above 0.",
        n_of="pairs of tokens",
        style="percent",
        better="low",
    ),
    FigureSpec(
        "within",
        "Within-series lag-1",
        "Mean over series (clip, patch, feature) of sum (z_t - z̄)(z_t+1 - z̄) / sum (z_t - z̄)², each about its own "
        "mean. Biased: shuffled time gives -1/{steps} = {bias} on average, so figures of different numbers of steps "
        "are not comparable. Series that never change are undefined and left out, the perfectly coherent ones among "
        "them. Clips with repeated frames are left out.",
        n_of="series that vary, of {active} active",
        better="high",
        null="coherence.within.{subject}_shuffled",
        name="coherence.within.{subject}",
    ),
    FigureSpec(
        "within_null",
        "Within-series lag-1",
        "Null, exact: the expectation over all orders of time is -1/T = -1/{steps} for any values.",
        n_of="series that vary",
        name="coherence.within.{subject}",
    ),
    *_step("cosine", "Step-to-step cosine", _COSINE, "high", "number"),
    *_step("jaccard", "Support Jaccard", _JACCARD, "high", "number"),
    *_step("flip_rate", "Flip rate", _FLIP, "low", "percent"),
    FigureSpec(
        "step_frames",
        "One latent step, frames",
        f"{_STEP}, in frames of the source video (tubelet length x frame stride).",
        n_of="clips",
    ),
    FigureSpec(
        "step_seconds",
        "One latent step, seconds",
        f"{_STEP}, in seconds, from the frames' timestamps or else the frame rate.",
        n_of="clips",
        style="seconds",
    ),
)


class _Order(NamedTuple):
    """An order of a clip's steps, and what pairs it makes."""

    steps_T: Tensor
    pairs_LTT: Tensor


class _Temporal:
    """Statistics of codes or raw activations, in true order and with time shuffled."""

    def __init__(self, subject: Subject, shuffled: Subject, features: int, lags: int, setting: Setting) -> None:
        self.subject, self.shuffled = subject, shuffled
        self.features = features
        self.unit = "latent" if subject == "sae" else "raw dimension"
        self.pooled = PooledAutocorrelation(features, lags, setting.device)
        self.nulls = [PooledAutocorrelation(features, lags, setting.device) for _ in range(setting.null_draws)]
        self.within = WithinAutocorrelation()
        self.cosine, self.null_cosine = StepCosine(), StepCosine()

    def null_values(self, lag: int) -> list[PooledValue]:
        """The null's draws at `lag`."""
        return [null.value(lag) for null in self.nulls]


class Coherence:
    """Metric: temporal coherence of the codes against the raw activations, with the shuffled-time null."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._steps = setting.store.plan.grid.time
        self._lags = min(setting.lags, self._steps - 1)
        mean = setting.store.moments(setting.hook).mean
        self._center_D = torch.from_numpy(mean).to(setting.device)
        self._sae = _Temporal("sae", "sae_shuffled", setting.latents, self._lags, setting)
        self._raw = _Temporal("raw", "raw_shuffled", setting.channels, self._lags, setting)
        self._support, self._null_support = SupportOverlap(), SupportOverlap()

    def add(self, window: Window) -> None:
        """Add the clips of one window."""
        if not self._lags:
            return
        seed, valid_CT = self._setting.seed, window.valid_CT
        shuffled_DCT = [
            shuffled_steps(window.clips, valid_CT, seed=seed, draw=draw) for draw in range(self._setting.null_draws)
        ]
        in_order_T = torch.arange(self._steps, device=valid_CT.device)
        for place, (codes, x_TSD) in enumerate(zip(window.codes, window.x_CTSD, strict=True)):
            valid_T = valid_CT[place]
            orders = [
                _Order(order_T, pairs_at_lags(valid_T, order_T, self._lags))
                for order_T in (in_order_T, *(order_CT[place] for order_CT in shuffled_DCT))
            ]
            series = Series.of(codes)
            # Correlations are taken of centered values, so that their sums do not cancel.
            x_TSD = x_TSD.double()
            centered_TSD = x_TSD - self._center_D
            for part, by_feature, by_patch_TTS, values_TM in (
                (self._sae, series.by_feature(), series.by_patch(), series.values_TM),
                (self._raw, FeatureProducts.of(centered_TSD), patch_products(x_TSD), centered_TSD.flatten(1)),
            ):
                for pooled, order in zip((part.pooled, *part.nulls), orders, strict=True):
                    pooled.add(by_feature, valid_T, order.pairs_LTT)
                part.cosine.add(by_patch_TTS, valid_T, orders[0].steps_T)
                part.null_cosine.add(by_patch_TTS, valid_T, orders[1].steps_T)
                part.within.add(values_TM, valid_T)
            common_TTS = series.common()
            self._support.add(common_TTS, valid_T, orders[0].steps_T)
            self._null_support.add(common_TTS, valid_T, orders[1].steps_T)

    def section(self) -> Section:
        """Figures over everything added."""
        title = "Temporal coherence"
        if not self._lags:
            note = "The token grid has one latent step: temporal coherence is undefined."
            return Section(name="coherence", title=title, lead=note)
        both = (self._sae, self._raw)
        summaries = ("mean", "median", "weighted_mean")
        return Section(
            name="coherence",
            title=title,
            lead="Is the code of a patch as stable from one latent step to the next as the raw activation? "
            f"{self._distance()}",
            figures=(
                *(figure for summary in summaries for part in both for figure in self._pooled(part, summary)),
                *self._drops(),
                *(figure for part in both for figure in self._within(part)),
                *self._stability(both),
                *self._distances(),
            ),
            curves=(self._curve(),),
            notes=(
                "A dictionary with a few always-on latents scores high whatever it encodes: read these "
                "figures together with FVU, L0, dead latents and the density histogram.",
                "Two backbones are comparable only at an equal distance in time, and at the same sampling of frames.",
                "Differences between clips and between patches count as coherence: the shuffled columns show how much "
                "of a figure they make up.",
            ),
        )

    def latents(self) -> tuple[LatentColumn, ...]:
        """Pooled lag-1 autocorrelation of every latent."""
        if not self._lags:
            return ()
        return (
            LatentColumn(
                "coherence",
                self._sae.pooled.per_feature(1).cpu().numpy(),
                "Pearson correlation of the latent over all pairs of tokens one latent step apart (same clip, same "
                f"patch). {_PAIRS} Undefined where the latent does not vary.",
            ),
        )

    def _distance(self) -> str:
        time = self._setting.time
        known = [f"{time.step_frames:.3g} frames" if time.step_frames is not None else ""]
        known += [f"{time.step_seconds:.3g} s" if time.step_seconds is not None else ""]
        words = " = ".join(word for word in known if word)
        return (
            f"One latent step is {words} of video."
            if words
            else "The store does not record the length of a latent step."
        )

    def _drops(self) -> tuple[Figure, ...]:
        sae, raw = self._sae.pooled.value(1), self._raw.pooled.value(1)
        sae_null, raw_null = _mean_of(self._sae.null_values(1), "mean"), _mean_of(self._raw.null_values(1), "mean")
        above = None
        if None not in (sae.mean, raw.mean, sae_null, raw_null):
            above = _drop(_minus(raw.mean, raw_null), _minus(sae.mean, sae_null))
        return (
            FIGURES.fill("drop", _drop(raw.mean, sae.mean), sae.pairs),
            FIGURES.fill("drop_weighted", _drop(raw.weighted_mean, sae.weighted_mean), sae.pairs),
            FIGURES.fill("drop_above_null", above, sae.pairs),
        )

    def _pooled(self, part: _Temporal, summary: str) -> tuple[Figure, ...]:
        value = part.pooled.value(1)
        words: dict[str, Any] = {
            "unit": part.unit,
            "of": f"{part.features:,}",
            "pairs": f"{value.pairs:,}",
            "draws": len(part.nulls),
            "seed": self._setting.seed,
        }
        key = {"mean": "lag1", "median": "lag1_median", "weighted_mean": "lag1_weighted"}[summary]
        null, ends = spread([of for null in part.null_values(1) if (of := _of(null, summary)) is not None])
        null_features = max((null.features for null in part.null_values(1)), default=0)
        headline = part.subject == "sae"
        return (
            FIGURES.fill(key, _of(value, summary), value.features, subject=part.subject, headline=headline, **words),
            FIGURES.fill(f"{key}_null", null, null_features, subject=part.shuffled, ends=ends, **words),
        )

    def _within(self, part: _Temporal) -> tuple[Figure, ...]:
        within, bias = part.within, -1 / self._steps
        words: dict[str, Any] = {"steps": self._steps, "bias": f"{bias:.3f}", "active": f"{within.active:,}"}
        null = bias if within.defined else None
        return (
            FIGURES.fill("within", within.mean, within.defined, subject=part.subject, **words),
            FIGURES.fill("within_null", null, within.defined, subject=part.shuffled, **words),
        )

    def _stability(self, both: Iterable[_Temporal]) -> Iterator[Figure]:
        for part in both:
            for key, subject, cosine in (
                ("cosine", part.subject, part.cosine),
                ("cosine_null", part.shuffled, part.null_cosine),
            ):
                yield FIGURES.fill(key, cosine.mean, cosine.pairs, subject=subject)
        shown: tuple[tuple[str, Subject, SupportOverlap], ...] = (
            ("", "sae", self._support),
            ("_null", "sae_shuffled", self._null_support),
        )
        for suffix, subject, overlap in shown:
            yield FIGURES.fill(f"jaccard{suffix}", overlap.jaccard, overlap.jaccard_pairs, subject=subject)
            yield FIGURES.fill(f"flip_rate{suffix}", overlap.flip_rate, overlap.flip_pairs, subject=subject)

    def _distances(self) -> tuple[Figure, ...]:
        time, clips = self._setting.time, len(self._setting.clips)
        return (
            FIGURES.fill("step_frames", time.step_frames, clips),
            FIGURES.fill("step_seconds", time.step_seconds, clips),
        )

    def _curve(self) -> Curve:
        lags = range(1, self._lags + 1)
        lines = []
        for part, label in ((self._raw, "raw"), (self._sae, "SAE")):
            nulls = [[v for null in part.null_values(lag) if (v := null.mean) is not None] for lag in lags]
            lines += [
                Line(label=label, subject=part.subject, y=tuple(part.pooled.value(lag).mean for lag in lags)),
                Line(
                    label=f"{label}, time shuffled",
                    subject=part.shuffled,
                    y=tuple(sum(draws) / len(draws) if draws else None for draws in nulls),
                    low=tuple(min(draws, default=None) for draws in nulls),
                    high=tuple(max(draws, default=None) for draws in nulls),
                ),
            ]
        time = self._setting.time
        step = f" (1 step = {time.step_seconds:.3g} s)" if time.step_seconds is not None else ""
        return Curve(
            name="coherence.lags",
            title="Autocorrelation against distance in time",
            x_label=f"lag in latent steps{step}",
            y_label="pooled autocorrelation",
            x=tuple(float(lag) for lag in lags),
            lines=tuple(lines),
            definition="Pooled autocorrelation (mean over features) of tokens of the same patch so many latent steps "
            "apart. Dashed with a band: time shuffled within each clip, mean and range of "
            f"{self._setting.null_draws} draws.",
            zero_line=True,
            integer_x=True,
        )


def _of(value: PooledValue, summary: str) -> float | None:
    return {"mean": value.mean, "median": value.median, "weighted_mean": value.weighted_mean}[summary]


def _mean_of(values: Sequence[PooledValue], summary: str) -> float | None:
    known = [figure for value in values if (figure := _of(value, summary)) is not None]
    return sum(known) / len(known) if known else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _drop(raw: float | None, sae: float | None) -> float | None:
    return None if raw is None or sae is None or raw <= 0 else (raw - sae) / raw
