"""Does the code stay the same while the scene stays the same? Temporal coherence of codes and of raw activations.

    headline   pooled lag-1 autocorrelation of the codes, beside the same statistic of the raw dimensions
    null       time shuffled within each clip: what is left is the difference between clips and patches
    drop       (raw - SAE) / raw

Definitions: science note 1.4 [RECON]; the paper that reports a drop of 36 % does not give its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tubelet_lens.codes.series import FeatureProducts, Series, pairs_at_lags, patch_products, shuffled_steps
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.metrics.metric import Setting
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


class _Order(NamedTuple):
    """An order of a clip's steps, and what pairs it makes."""

    steps_T: Tensor
    pairs_LTT: Tensor


class _Temporal:
    """Statistics of one thing (codes or raw activations), in true order and with time shuffled."""

    def __init__(self, subject: Subject, shuffled: Subject, features: int, lags: int, setting: Setting) -> None:
        self.subject, self.shuffled = subject, shuffled
        self.features = features
        self.pooled = PooledAutocorrelation(features, lags, setting.device)
        self.nulls = [PooledAutocorrelation(features, lags, setting.device) for _ in range(setting.null_draws)]
        self.within = WithinAutocorrelation()
        self.cosine, self.null_cosine = StepCosine(), StepCosine()

    def add(self, by_feature: FeatureProducts, by_patch_TTS: Tensor, valid_T: Tensor, orders: list[_Order]) -> None:
        """Add a clip; `orders` are the true one and the null's."""
        for pooled, order in zip((self.pooled, *self.nulls), orders, strict=True):
            pooled.add(by_feature, valid_T, order.pairs_LTT)
        self.cosine.add(by_patch_TTS, valid_T, orders[0].steps_T)
        self.null_cosine.add(by_patch_TTS, valid_T, orders[1].steps_T)

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
        """Take in one window."""
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
            self._sae.add(series.by_feature(), series.by_patch(), valid_T, orders)
            self._sae.within.add(series.values_TM, valid_T)
            common_TTS = series.common()
            self._support.add(common_TTS, valid_T, orders[0].steps_T)
            self._null_support.add(common_TTS, valid_T, orders[1].steps_T)
            # Correlations are taken of centered values, so that their sums do not cancel.
            x_TSD = x_TSD.double()
            centered_TSD = x_TSD - self._center_D
            self._raw.add(FeatureProducts.of(centered_TSD), patch_products(x_TSD), valid_T, orders)
            self._raw.within.add(centered_TSD.flatten(1), valid_T)

    def section(self) -> Section:
        """Figures over everything added."""
        title = "Temporal coherence"
        if not self._lags:
            note = "The token grid has one latent step: nothing can be said about time."
            return Section(name="coherence", title=title, lead=note)
        both = (self._sae, self._raw)
        summaries = ("mean", "median", "weighted_mean")
        return Section(
            name="coherence",
            title=title,
            lead="Does the code of a patch stay the same from one latent step to the next, as much as the raw "
            "activation "
            f"does? {self._distance()}",
            figures=(
                *(figure for summary in summaries for part in both for figure in self._pooled(part, summary)),
                *self._drops(),
                *(figure for part in both for figure in self._within(part)),
                *self._stability(both),
                *self._distances(),
            ),
            curves=(self._curve(),),
            notes=(
                "A dictionary with a few always-on latents scores high whatever it says about the video: read "
                "these figures "
                "beside FVU, L0, dead latents and the density histogram.",
                "Two backbones are comparable only at an equal distance in time, and at the same sampling of frames.",
                "Differences between clips and between patches count as coherence: the shuffled columns say "
                "how much of a "
                "figure they make up.",
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
            f"One latent step is {words} of video." if words else "How long a latent step is, the store does not say."
        )

    def _drops(self) -> tuple[Figure, ...]:
        sae, raw = self._sae.pooled.value(1), self._raw.pooled.value(1)
        sae_null, raw_null = _mean_of(self._sae.null_values(1), "mean"), _mean_of(self._raw.null_values(1), "mean")
        above = None
        if None not in (sae.mean, raw.mean, sae_null, raw_null):
            above = _drop(_minus(raw.mean, raw_null), _minus(sae.mean, sae_null))
        shared = {"n": sae.pairs, "n_of": "pairs of tokens", "style": "percent", "better": "low"}
        return (
            Figure(
                name="coherence.drop",
                title="Drop in coherence, raw to SAE",
                value=_drop(raw.mean, sae.mean),
                definition="(raw - SAE) / raw of the pooled lag-1 autocorrelation (means over features). "
                "Positive: the code is "
                "less coherent than what it encodes; negative: more. Undefined where raw is not above 0.",
                headline=True,
                **shared,
            ),
            Figure(
                name="coherence.drop_weighted",
                title="Drop, weighted by activity",
                value=_drop(raw.weighted_mean, sae.weighted_mean),
                definition="The same drop of the activity-weighted means: latents that fire often count more.",
                **shared,
            ),
            Figure(
                name="coherence.drop_above_null",
                title="Drop above the null",
                value=above,
                definition="(R - C) / R with R = raw - shuffled raw and C = SAE - shuffled SAE: the drop in "
                "the part of "
                "coherence that depends on the order of time. Undefined where R is not above 0.",
                **shared,
            ),
        )

    def _pooled(self, part: _Temporal, summary: str) -> tuple[Figure, ...]:
        value = part.pooled.value(1)
        unit = _unit(part)
        how = {
            "mean": f"mean over the {unit}s",
            "median": f"median over the {unit}s",
            "weighted_mean": f"mean over the {unit}s, weighted by the number of tokens on which each is active,",
        }[summary]
        definition = (
            f"Per {unit}: Pearson correlation over all pairs of tokens one latent step apart (same clip, same "
            "patch), pooled "
            f"over clips, steps and patches ({value.pairs:,} pairs); then the {how} for which it is defined, "
            "that is which "
            f"vary over the pairs. {_PAIRS}"
        )
        draws = [figure for null in part.null_values(1) if (figure := _of(null, summary)) is not None]
        key = {"mean": "lag1", "median": "lag1_median", "weighted_mean": "lag1_weighted"}[summary]
        title = {
            "mean": "Pooled lag-1 autocorrelation",
            "median": "Pooled lag-1, median",
            "weighted_mean": "Pooled lag-1, weighted by activity",
        }[summary]
        null_features = max((null.features for null in part.null_values(1)), default=0)
        return (
            Figure(
                name=f"coherence.{key}.{part.subject}",
                title=title,
                subject=part.subject,
                value=_of(value, summary),
                n=value.features,
                n_of=f"{unit}s of {part.features:,}",
                definition=definition,
                better="high",
                headline=summary == "mean" and part.subject == "sae",
            ),
            Figure(
                name=f"coherence.{key}.{part.shuffled}",
                title=title,
                subject=part.shuffled,
                value=sum(draws) / len(draws) if draws else None,
                low=min(draws, default=None),
                high=max(draws, default=None),
                n=null_features,
                n_of=f"{unit}s of {part.features:,}",
                definition=f"Null: the same statistic with the latent steps of each clip in random order (one "
                "order per clip, "
                f"shared by all patches and features, seed {self._setting.seed}); mean, lowest and highest of "
                f"{len(part.nulls)} draws. What is left is the difference between clips and between patches. "
                + definition,
            ),
        )

    def _within(self, part: _Temporal) -> tuple[Figure, ...]:
        within = part.within
        bias = -1 / self._steps
        return (
            Figure(
                name=f"coherence.within.{part.subject}",
                title="Within-series lag-1",
                subject=part.subject,
                value=within.mean,
                n=within.defined,
                n_of=f"series that vary, of {within.active:,} active",
                definition="Mean over series (clip, patch, feature) of sum (z_t - z̄)(z_t+1 - z̄) / sum (z_t - "
                "z̄)², each about "
                f"its own mean. Biased: shuffled time gives -1/{self._steps} = {bias:.3f} on average, so "
                "figures of different "
                "numbers of steps are not comparable. Series that never change are undefined and left out, the "
                "perfectly "
                "coherent ones among them. Clips with repeated frames are left out.",
                better="high",
            ),
            Figure(
                name=f"coherence.within.{part.shuffled}",
                title="Within-series lag-1",
                subject=part.shuffled,
                value=bias if within.defined else None,
                n=within.defined,
                n_of="series that vary",
                definition=f"Null, exact: the expectation over all orders of time is -1/T = -1/{self._steps} "
                "for any values.",
            ),
        )

    def _stability(self, both: Iterable[_Temporal]) -> tuple[Figure, ...]:
        null = "Null: the same with the steps of each clip in random order (one draw). "
        cosine = (
            "Mean over pairs of tokens one latent step apart of the cosine of their vectors, no mean "
            "subtracted; pairs with a "
            f"zero vector are left out. {_PAIRS}"
        )
        figures = []
        for part in both:
            for subject, seen, prefix in (
                (part.subject, part.cosine, ""),
                (part.shuffled, part.null_cosine, null),
            ):
                figures.append(
                    Figure(
                        name=f"coherence.cosine.{subject}",
                        title="Step-to-step cosine",
                        subject=subject,
                        value=seen.mean,
                        n=seen.pairs,
                        n_of="pairs of tokens",
                        definition=prefix + cosine,
                        better="high" if not prefix else "neither",
                    )
                )
        for subject, overlap, prefix in (("sae", self._support, ""), ("sae_shuffled", self._null_support, null)):
            figures += [
                Figure(
                    name=f"coherence.jaccard.{subject}",
                    title="Support Jaccard",
                    subject=subject,
                    value=overlap.jaccard,
                    n=overlap.jaccard_pairs,
                    n_of="pairs of tokens",
                    definition=f"{prefix}Mean over pairs one latent step apart of |A and B| / |A or B|, where A "
                    "and B are the sets "
                    f"of active latents; pairs in which both are empty are left out. {_PAIRS}",
                    better="high" if not prefix else "neither",
                ),
                Figure(
                    name=f"coherence.flip_rate.{subject}",
                    title="Flip rate",
                    subject=subject,
                    value=overlap.flip_rate,
                    n=overlap.flip_pairs,
                    n_of="pairs of tokens",
                    definition=f"{prefix}Mean over pairs one latent step apart of 1 - |A and B| / |A|: the share "
                    "of a token's active latents that are off one step later; pairs in which the earlier token has "
                    "none are left out. Where k latents are active on every token, |A| = k; where the count varies, "
                    f"|A| is the token's own [RECON]. {_PAIRS}",
                    style="percent",
                    better="low" if not prefix else "neither",
                ),
            ]
        return tuple(figures)

    def _distances(self) -> tuple[Figure, ...]:
        time = self._setting.time
        shared = {"title": "One latent step", "n": len(self._setting.clips), "n_of": "clips"}
        how = "Median over clips of the distance between neighboring latent steps, repeated frames left out"
        return (
            Figure(
                name="coherence.step_frames",
                value=time.step_frames,
                definition=f"{how}, in frames of the source video (tubelet length x frame stride).",
                **{**shared, "title": "One latent step, frames"},
            ),
            Figure(
                name="coherence.step_seconds",
                value=time.step_seconds,
                definition=f"{how}, in seconds, from the frames' timestamps or else the frame rate.",
                style="seconds",
                **{**shared, "title": "One latent step, seconds"},
            ),
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
            definition="Pooled autocorrelation (mean over features) of tokens of the same patch so many latent "
            "steps apart. Dashed "
            f"with a band: time shuffled within each clip, mean and range of {self._setting.null_draws} draws.",
            zero_line=True,
            integer_x=True,
        )


def _unit(part: _Temporal) -> str:
    return "latent" if part.subject == "sae" else "raw dimension"


def _of(value: PooledValue, summary: str) -> float | None:
    return {"mean": value.mean, "median": value.median, "weighted_mean": value.weighted_mean}[summary]


def _mean_of(values: Sequence[PooledValue], summary: str) -> float | None:
    known = [figure for value in values if (figure := _of(value, summary)) is not None]
    return sum(known) / len(known) if known else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _drop(raw: float | None, sae: float | None) -> float | None:
    return None if raw is None or sae is None or raw <= 0 else (raw - sae) / raw
