"""Laws of the clip metrics on planted truth: codes whose classes and captions are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_lens.config import ActionConfig, EvaluateConfig
from tubelet_lens.inputs.latent_time import latent_time
from tubelet_lens.inputs.pooled_clips import Pooled, PooledSplit
from tubelet_lens.metrics.action_probe import action
from tubelet_lens.metrics.clip_vectors import vectors
from tubelet_lens.metrics.code_ablation import code_ablation
from tubelet_lens.metrics.label_purity import label_purity
from tubelet_lens.metrics.metric import ClipSetting, Setting
from tubelet_lens.metrics.monosemanticity import measure_monosemanticity
from tubelet_lens.metrics.retrieval import retrieval
from tubelet_lens.results.section import Section, Subject
from tubelet_store.reader import Store

CLASSES, OWN, LATENTS = 4, 3, 60
COLORS, SHAPES = ("red", "green", "blue"), ("ball", "cube")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("clip-metrics") / "s.zarr", make_plan(clips=4, hooks={"blocks.1": 8}))


def planted(store: Store, clips: int, seed: int, *, wrong: float = 0.0, views: int = 1) -> PooledSplit:
    """Class c lights up latents 3c ... 3c + 2, or in a share `wrong` of the videos another class's; the others fire at
    random, but for the last six: they say color and shape, as the caption does."""
    rng = np.random.default_rng(seed)
    videos = np.arange(clips) // views
    label = rng.integers(0, CLASSES, videos[-1] + 1)
    shown = np.where(rng.random(len(label)) < wrong, (label + rng.integers(1, CLASSES, len(label))) % CLASSES, label)
    codes = (rng.random((clips, LATENTS)) * (rng.random((clips, LATENTS)) < 0.5)).astype(np.float32)
    codes[:, : CLASSES * OWN] = 0
    for latent in range(CLASSES * OWN):
        codes[:, latent] = (shown[videos] == latent // OWN) * (1 + 0.05 * rng.standard_normal(clips))
    color, shape = rng.integers(0, 3, len(label)), rng.integers(0, 2, len(label))
    codes[:, -6:] = 0
    codes[np.arange(clips), LATENTS - 6 + color[videos]] = 1
    codes[np.arange(clips), LATENTS - 2 + shape[videos]] = 1
    basis, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((LATENTS, LATENTS)))
    raw = (codes @ basis).astype(np.float32)
    noise = rng.standard_normal((clips, LATENTS)).astype(np.float32)
    return PooledSplit(
        store=store,
        clips=np.arange(clips),
        videos=np.array([f"{seed}-{video}" for video in videos], dtype=object),
        labels=label[videos].astype(np.int64),
        label_names=np.array([f"action {value}" for value in label[videos]], dtype=object),
        captions=np.array([f"A {COLORS[c]} {SHAPES[s]}." for c, s in zip(color, shape, strict=True)], dtype=object)[
            videos
        ],
        draws={
            "sae": (Pooled(codes, codes),),
            "raw": (Pooled(raw, raw),),
            "random_topk": (Pooled(noise, noise), Pooled(noise[:, ::-1].copy(), noise)),
        },
    )


def clip_setting(store: Store, fit: PooledSplit | None, test: PooledSplit) -> ClipSetting:
    clips = np.arange(4)
    setting = Setting(
        store=store,
        hook="blocks.1",
        clips=clips,
        latents=LATENTS,
        time=latent_time(store, clips),
        lags=1,
        null_draws=2,
        seed=0,
        device=torch.device("cpu"),
    )
    config = EvaluateConfig(run=Path("run"), store="s", action=ActionConfig(poolings=("mean",), bootstrap=500))
    return ClipSetting(setting=setting, config=config, sae=None, trained=None, fit=fit, test=test)  # type: ignore[arg-type]


def values(section: Section) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in section.figures}


def section_of(found: object) -> Section:
    assert found is not None
    return found.section  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def sure(store: Store) -> ClipSetting:
    return clip_setting(store, planted(store, 240, 1), planted(store, 200, 2))


def test_the_probe_reads_the_class_as_often_as_it_is_written(store: Store) -> None:
    noisy = clip_setting(store, planted(store, 300, 1, wrong=0.2), planted(store, 600, 2, wrong=0.2))
    found = section_of(action(noisy))
    figures = {figure.name: figure for figure in found.figures}
    written = figures["action.top1.sae"]
    assert written.value == pytest.approx(0.8, abs=0.05)
    assert written.low is not None
    assert written.high is not None
    assert written.low < 0.8 < written.high
    assert figures["action.top1.permuted"].value == pytest.approx(0.25, abs=0.08)
    assert figures["action.top1.random_topk"].value == pytest.approx(0.25, abs=0.08)
    assert figures["action.chance"].value == 0.25
    assert "action.top5.sae" not in figures


def test_the_lead_over_each_control_is_the_signed_difference(sure: ClipSetting) -> None:
    figures = {figure.name: figure for figure in section_of(action(sure)).figures}
    for control in ("raw", "random_topk", "pca"):
        gain = figures[f"action.gain.{control}"]
        sae, other = figures["action.top1.sae"].value, figures[f"action.top1.{control}"].value
        assert gain.value == pytest.approx(sae - other)  # type: ignore[operator]
        assert gain.low is not None
        assert gain.high is not None
        assert gain.low <= gain.value <= gain.high  # type: ignore[operator]
    low = figures["action.gain.random_topk"].low
    assert low is not None
    assert low > 0.5
    # A rotation of the code holds the same classes.
    assert figures["action.top1.raw"].value == pytest.approx(1, abs=0.02)


def test_views_of_a_video_are_one_prediction(store: Store) -> None:
    several = clip_setting(store, planted(store, 200, 1, views=2), planted(store, 120, 2, views=3))
    assert section_of(action(several)).figures[0].n == 40


def test_without_labels_or_without_anything_to_fit_on_there_are_no_figures(store: Store, sure: ClipSetting) -> None:
    blind = planted(store, 40, 3)
    blind.labels[:] = -1
    blind.captions[:] = None
    for metric in (action, code_ablation, retrieval):
        assert metric(clip_setting(store, None, sure.test)) is None
        assert metric(clip_setting(store, blind, sure.test)) is None
        assert metric(clip_setting(store, sure.fit, blind)) is None


def test_one_label_under_two_names_is_refused(store: Store, sure: ClipSetting) -> None:
    other = planted(store, 40, 3)
    other.label_names[:] = "something else"
    with pytest.raises(TubeletError, match=r"Label 0 is 'action 0'.*'something else'"):
        action(clip_setting(store, sure.fit, other))


def test_taking_away_a_classs_latents_destroys_that_class_alone(sure: ClipSetting) -> None:
    found = code_ablation(sure)
    figures = values(section_of(found))
    assert figures["ablation.before.sae"] == 1
    # All three must go: any one of them still tells the class.
    assert figures["ablation.class_m50.sae"] == OWN
    assert figures["ablation.class_others"] == pytest.approx(0, abs=0.02)
    assert figures["ablation.class_area.sae"] > 0.4  # type: ignore[operator]
    assert figures["ablation.class_area.random"] == pytest.approx(0, abs=0.02)
    assert figures["ablation.area.random"] == pytest.approx(0, abs=0.02)
    assert figures["ablation.area_bottom"] == pytest.approx(0, abs=0.02)
    assert OWN <= figures["ablation.m50.sae"] <= CLASSES * OWN  # type: ignore[operator]
    assert figures["ablation.m50.random"] is None
    assert found is not None
    columns = {column.name: column.values_F for column in found.latents}
    assert columns["probe_label"][: CLASSES * OWN].tolist() == [latent // OWN for latent in range(CLASSES * OWN)]
    assert columns["probe_importance"][: CLASSES * OWN].min() > columns["probe_importance"][CLASSES * OWN :].max()


def test_latents_of_a_class_are_pure_and_others_are_not(sure: ClipSetting) -> None:
    found = label_purity(sure)
    assert found is not None
    columns = {column.name: column.values_F for column in found.latents}
    own = slice(0, CLASSES * OWN)
    assert (columns["purity_16"][own] == 1).all()
    assert columns["top_label"][own].tolist() == [latent // OWN for latent in range(CLASSES * OWN)]
    assert (columns["top_label_share"][own] == 1).all()
    assert np.nanmean(columns["purity_16"][12:50]) == pytest.approx(
        values(found.section)["labels.purity.permuted"], abs=0.06
    )
    assert values(found.section)["labels.pure"] == pytest.approx(CLASSES * OWN / LATENTS, abs=0.06)


def test_retrieval_finds_the_videos_of_a_caption_and_noise_does_not(sure: ClipSetting) -> None:
    figures = values(section_of(retrieval(sure)))
    for direction in ("text_to_video", "video_to_text"):
        assert figures[f"retrieval.{direction}_r1.sae"] > 0.95  # type: ignore[operator]
        assert figures[f"retrieval.{direction}_r1.raw"] > 0.95  # type: ignore[operator]
        assert figures[f"retrieval.{direction}_medr.sae"] == 1
    assert figures["retrieval.video_to_text_r1.random_topk"] == pytest.approx(1 / 6, abs=0.1)
    assert figures["retrieval.video_to_text_chance"] == pytest.approx(1 / 6)
    assert figures["retrieval.text_to_video_chance"] == pytest.approx(1 / 6)


def test_one_null_is_used_in_the_figure_and_in_what_is_above_it(sure: ClipSetting) -> None:
    found = values(section_of(measure_monosemanticity(sure)))
    e_NE = sure.test.pooled["raw"].mean_NF.astype(np.float64)
    e_NE /= np.linalg.norm(e_NE, axis=1, keepdims=True)
    null = found["monosemanticity.mean.permuted"]
    assert null == pytest.approx((e_NE @ e_NE.T)[np.triu_indices(len(e_NE), 1)].mean(), abs=1e-12)
    for subject, above in (("sae", "monosemanticity.above_null"), ("raw", "monosemanticity.above_null.raw")):
        assert found[above] == found[f"monosemanticity.mean.{subject}"] - null
    # What is drawn lies around it.
    figure = next(f for f in section_of(measure_monosemanticity(sure)).figures if f.name.endswith("mean.permuted"))
    assert figure.low == pytest.approx(null, abs=0.02)
    assert figure.high == pytest.approx(null, abs=0.02)


def test_distributions_of_monosemanticity_are_given_at_the_same_places_whatever_the_data(
    store: Store, sure: ClipSetting
) -> None:
    other = clip_setting(store, None, planted(store, 50, 3))
    curves = [section_of(measure_monosemanticity(setting)).curves[0] for setting in (sure, other)]
    assert curves[0].x == curves[1].x
    for curve, setting in zip(curves, (sure, other), strict=True):
        found = values(section_of(measure_monosemanticity(setting)))
        by_label = {line.label: line.y for line in curve.lines}
        assert by_label["SAE"] == tuple(sorted(by_label["SAE"]))
        middle, last = curve.x.index(0.5), curve.x.index(1.0)
        assert by_label["SAE"][middle] == pytest.approx(found["monosemanticity.median.sae"])
        assert by_label["raw dimensions"][last] == pytest.approx(found["monosemanticity.max.raw"])
    assert curves[0].lines[0].y != curves[1].lines[0].y


class Turned:
    """The encoder whose codes `planted` has: it takes the turn of the raw activations back."""

    def __init__(self, off: float = 0.0) -> None:
        basis, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((LATENTS, LATENTS)))
        self._basis, self._off = torch.from_numpy(basis.T.astype(np.float32)), off

    def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
        codes_NF = x_ND @ self._basis
        return torch.where(codes_NF > self._off, codes_NF, 0.0)


def test_pooled_before_encoding_is_the_code_of_the_mean_token(store: Store, sure: ClipSetting) -> None:
    assert sure.fit is not None
    encoders: dict[Subject, Any] = {"sae": (Turned(),), "random_topk": (Turned(2.0), Turned(0.5))}
    setting = replace(sure, encoders=encoders)
    rows, test_rows = next(vectors(setting, sure.fit, "sae", "mean_then_encode"))
    # A clip of one token: before or after is the same.
    np.testing.assert_allclose(rows, np.maximum(sure.fit.pooled["sae"].mean_NF, 0), atol=1e-5)
    np.testing.assert_allclose(test_rows, np.maximum(sure.test.pooled["sae"].mean_NF, 0), atol=1e-5)
    by_draw = [there for _, there in vectors(setting, sure.fit, "random_topk", "mean_then_encode")]
    assert not by_draw[0].any()
    assert by_draw[1].any()
    for subject in ("raw", "pca"):
        plain, first = (next(vectors(setting, sure.fit, subject, kind))[1] for kind in ("mean", "mean_then_encode"))
        np.testing.assert_array_equal(plain, first)
    poolings = ActionConfig(poolings=("mean", "mean_then_encode"), bootstrap=10)
    setting = replace(setting, config=sure.config.model_copy(update={"action": poolings}))
    figures = {figure.name: figure for figure in section_of(action(setting)).figures}
    assert figures["action.top1_mean_then_encode.sae"].value == figures["action.top1.sae"].value == 1.0
    assert figures["action.top1_mean_then_encode.random_topk"].value < 1.0
    assert "pooled first, then encoded" in figures["action.top1_mean_then_encode.sae"].definition
    assert "pooled first" not in figures["action.top1_mean_then_encode.raw"].definition
