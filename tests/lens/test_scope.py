"""Laws of information scope: distances are scipy's, planted latents score what they must, time is nothing to a
frame-wise backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance, wasserstein_distance_nd
from torch import Tensor

from in_process import extract_here
from stores import make_plan, make_store, planned_table
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.evaluate import evaluate
from tubelet_lens.inputs.shifted_pairs import Axis, shifted_pairs
from tubelet_lens.metrics.contextual_dependency import (
    Scope,
    line_distance,
    measure_scope,
    next_of_another_video,
    otsu,
    plane_distance,
)
from tubelet_lens.metrics.group_removal import remove_from_means, remove_latents
from tubelet_pipeline.backbones.tiny import write_tiny_dinov2
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_trainer.config import HoldoutConfig, TrainConfig
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.config import TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

HOOK, CPU = "blocks.1", torch.device("cpu")
VIDEOS, STEPS, SIDE = 24, 6, 6
SHIFT_PATCHES, SHIFT_STEPS = 1, 2
LOCAL, BOUND, ANYWHERE, LOST, SILENT = range(5)
QUICK: dict[str, Any] = {
    "device": "cpu",
    "controls": False,
    "control_draws": 1,
    "skip": ("coherence", "action", "labels", "ablation", "retrieval"),
    # One penalty: none is chosen, so the probe without each group is fitted once instead of five times.
    "action": {"penalties": [0.1]},
}


def a_map(rng: np.random.Generator, places: int, sparse: float) -> np.ndarray:
    values = rng.random(places) * (rng.random(places) < sparse)
    values[rng.integers(places)] = 1.0
    return values / values.sum()


@given(
    seed=st.integers(0, 10**6), height=st.integers(1, 6), width=st.integers(1, 6), sparse=st.sampled_from([0.2, 1.0])
)
@settings(max_examples=25, deadline=None)
def test_distance_in_the_plane_is_scipys(seed: int, height: int, width: int, sparse: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = (a_map(rng, height * width, sparse) for _ in range(2))
    places = np.stack(np.divmod(np.arange(height * width), width), axis=1).astype(float)
    expected = wasserstein_distance_nd(places, places, one, other) if height * width > 1 else 0.0
    assert plane_distance(one, other, width) == pytest.approx(expected, abs=1e-9)
    assert plane_distance(one, one, width) == 0.0


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_distance_in_time_is_scipys(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (np.stack([a_map(rng, steps, 0.6) for _ in range(3)]) for _ in range(2))
    t = np.arange(steps)
    expected = [wasserstein_distance(t, t, a, b) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(line_distance(one, other), expected, atol=1e-12)


def test_otsu_parts_two_heaps_and_leaves_one_value_whole() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([0.1 + 0.01 * rng.random(70), 0.6 + 0.01 * rng.random(30), [np.nan]])
    split = otsu(values)
    assert split is not None
    assert 0.11 < split.threshold < 0.6
    assert split.separation > 0.99
    assert otsu(np.zeros(5)) is None


@pytest.mark.parametrize("seed", range(5))
def test_otsu_leaves_the_least_variance_of_all_cuts(seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).exponential(size=60))
    left = [np.var(values[:cut]) * cut + np.var(values[cut:]) * (60 - cut) for cut in range(1, 60)]
    best = int(np.argmin(left)) + 1
    split = otsu(values)
    assert split is not None
    assert (values < split.threshold).sum() == best
    assert split.separation == pytest.approx(1 - min(left) / (60 * np.var(values)))


class Identity:
    """The SAE whose latents are the channels."""

    def __init__(self, channels: int) -> None:
        self.latents = channels

    def encode(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def decode(self, codes_NF: Tensor) -> Tensor:
        return codes_NF


def shifted_table(shifts: tuple[tuple[int, int], ...]) -> pa.Table:
    clips = VIDEOS * len(shifts)
    table = planned_table(clips, len(shifts))
    for name, values in (
        ("temporal_view", [0] * clips),
        ("shift_patches", [shift[0] for shift in shifts] * VIDEOS),
        ("shift_tubelets", [shift[1] for shift in shifts] * VIDEOS),
    ):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


def planted_views(rng: np.random.Generator) -> list[np.ndarray]:
    """The three views of one video, [T, H, W, 5], of latents with a planted scope.

    LOCAL fires on a content, wherever that is in the view; BOUND at one place of the view; ANYWHERE at a place
    chosen again in each view; LOST in the first view alone; SILENT never.
    """
    canvas = np.zeros((STEPS + SHIFT_STEPS, SIDE + SHIFT_PATCHES, SIDE + SHIFT_PATCHES))
    t, y, x = (int(rng.integers(low, high)) for low, high in ((2, STEPS), (1, SIDE), (1, SIDE)))
    canvas[t, y, x], canvas[t - 1, y, x] = 2.0, 1.0
    views = []
    for patches, steps in ((0, 0), (SHIFT_PATCHES, 0), (0, SHIFT_STEPS)):
        view = np.zeros((STEPS, SIDE, SIDE, 5))
        view[..., LOCAL] = canvas[steps : steps + STEPS, patches : patches + SIDE, patches : patches + SIDE]
        view[3, 2, 3, BOUND] = 1.0
        # In both views on what they share: all but the borders.
        view[int(rng.integers(2, 4)), int(rng.integers(1, SIDE - 1)), int(rng.integers(1, SIDE - 1)), ANYWHERE] = 1.0
        view[2:4, 2:4, 2:4, LOST] = 1.0 if patches == steps == 0 else 0.0
        views.append(view)
    return views


def planted_store(path: Path, failed: tuple[int, ...] = (), other_frames: tuple[int, ...] = ()) -> Store:
    shifts = ((0, 0), (SHIFT_PATCHES, 0), (0, SHIFT_STEPS))
    rng = np.random.default_rng(7)
    x = np.stack([view for _ in range(VIDEOS) for view in planted_views(rng)])
    plan = make_plan(clips=len(x), grid=(STEPS, SIDE, SIDE), hooks={HOOK: 5}, dtype="float32", clips_per_shard=len(x))
    writer = StoreWriter.begin(str(path), plan, shifted_table(shifts), {"made_by": "tests"})
    with writer.shard(0) as shard:
        for clip, values in enumerate(x):
            if clip in failed:
                shard.append(ClipOutcome.failure("open_failed", "broken on purpose"))
                continue
            first = 2 * shifts[clip % 3][1] + (1 if clip in other_frames else 0)
            frames = tuple(range(first, first + 2 * STEPS))
            tokens = values.reshape(STEPS, SIDE * SIDE, 5).astype(np.float32)
            shard.append(ClipOutcome(status="ok", frame_indices=frames, padded_frames=0), {HOOK: tokens}, None)
        shard.commit()
    writer.finish()
    return open_store(str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted_store(tmp_path_factory.mktemp("scope") / "s.zarr")


def scope_of(store: Store, axis: Axis, **options: object) -> Scope:
    pairs = shifted_pairs(store, axis)
    assert pairs is not None
    chosen = {"clips": 16, "vanished": "left_out"} | options
    return measure_scope(store, HOOK, Identity(5), pairs, device=CPU, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_planted_latents_have_the_scope_they_were_given(store: Store, axis: Axis) -> None:
    scope = scope_of(store, axis)
    assert scope.cds_F[LOCAL] == 0.0
    # In the overlap's own coordinates what stays at its place of the view has moved by the whole shift.
    moved = SHIFT_PATCHES / (SIDE - SHIFT_PATCHES - 1) if axis == "spatial" else SHIFT_STEPS / (STEPS - SHIFT_STEPS - 1)
    assert scope.cds_F[BOUND] == pytest.approx(moved)
    assert scope.null_F[BOUND] == pytest.approx(moved)
    assert scope.cds_F[ANYWHERE] > 0.25
    assert scope.cds_F[ANYWHERE] == pytest.approx(scope.null_F[ANYWHERE], abs=0.15)
    assert scope.null_F[LOCAL] > 0.15
    split = otsu(scope.cds_F)
    assert split is not None
    assert scope.cds_F[LOCAL] < split.threshold < scope.cds_F[ANYWHERE]


@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_what_vanishes_is_counted_and_can_count_as_one(store: Store, axis: Axis) -> None:
    scope = scope_of(store, axis)
    assert scope.pairs_F[LOST] == scope.vanished_F[LOST] == 16
    assert np.isnan(scope.cds_F[LOST])
    assert scope.vanished_F[LOCAL] == 0
    assert scope_of(store, axis, vanished="one").cds_F[LOST] == 1.0
    assert scope.pairs_F[SILENT] == 0
    assert np.isnan(scope.cds_F[SILENT])


def test_the_strongest_clips_are_taken(tmp_path: Path, store: Store) -> None:
    """Amplify BOUND in some clips where ANYWHERE stands: only those may count."""

    class Loud(Identity):
        def encode(self, x_ND: Tensor) -> Tensor:
            codes = x_ND.clone()
            # Pairs in which the content lies in the upper half are loud and say 0; the others are quiet.
            upper = x_ND.view(-1, SIDE - 1, SIDE - 1, 5)[:, :2, :, LOCAL].any()
            codes[:, ANYWHERE] = codes[:, LOCAL] * 5 if upper else codes[:, ANYWHERE]
            return codes

    pairs = shifted_pairs(store, "spatial")
    assert pairs is not None
    measure = {"vanished": "left_out", "device": CPU}
    assert measure_scope(store, HOOK, Loud(5), pairs, clips=3, **measure).cds_F[ANYWHERE] == 0.0  # type: ignore[arg-type]
    assert measure_scope(store, HOOK, Loud(5), pairs, clips=24, **measure).cds_F[ANYWHERE] > 0.0  # type: ignore[arg-type]


def test_pairs_that_do_not_show_the_same_are_left_out_and_counted(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "s.zarr", failed=(0, 4), other_frames=(8,))
    spatial, temporal = shifted_pairs(store, "spatial"), shifted_pairs(store, "temporal")
    assert spatial is not None
    assert temporal is not None
    assert (len(spatial.pairs), spatial.unusable) == (VIDEOS - 2, 2)  # clip 0 and clip 4 have failed
    assert (len(temporal.pairs), temporal.unusable) == (VIDEOS - 2, 2)  # clip 0 has failed, clip 8 has other frames
    assert temporal.largest == STEPS - SHIFT_STEPS - 1
    assert spatial.largest == pytest.approx(np.sqrt(2) * (SIDE - SHIFT_PATCHES - 1))
    only = shifted_pairs(store, "spatial", ["video-0003", "video-0005"])
    assert only is not None
    assert len(only.pairs) == 2


def test_the_null_takes_its_other_map_from_another_video() -> None:
    assert next_of_another_video(["a", "a", "b", "a", "c", "c"]).tolist() == [2, 2, 3, 4, 0, 0]
    assert next_of_another_video(["a", "a"]).tolist() == next_of_another_video([]).tolist() == []


@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_a_second_view_of_every_video_changes_no_null_and_one_video_has_none(store: Store, axis: Axis) -> None:
    once = shifted_pairs(store, axis)
    assert once is not None
    twice = replace(once, pairs=tuple(pair for pair in once.pairs for _ in range(2)))
    measure: dict[str, Any] = {"clips": 2 * VIDEOS, "vanished": "left_out", "device": CPU}
    expected, found = (measure_scope(store, HOOK, Identity(5), pairs, **measure) for pairs in (once, twice))
    np.testing.assert_allclose(found.null_F, expected.null_F)
    np.testing.assert_allclose(found.cds_F, expected.cds_F)
    alone = measure_scope(store, HOOK, Identity(5), replace(twice, pairs=twice.pairs[:2]), **measure)
    assert np.isfinite(alone.cds_F[ANYWHERE])
    assert np.isnan(alone.null_F).all()


# --- removal ----------------------------------------------------------------------------------------------------------


def test_removing_a_group_keeps_the_error_and_the_other_latents() -> None:
    normalization = Normalization(torch.randn(6), torch.tensor(2.5))
    sae = SAE(TopKConfig(k=3, latents=12), normalization).eval().requires_grad_(False)
    x = torch.randn(50, 6) * 3
    codes, group = sae.encode(x), np.array([1, 4, 5])
    without = remove_latents(sae, x, codes, group)
    kept = codes.clone()
    kept[:, group] = 0
    torch.testing.assert_close(without - sae.decode(kept), x - sae.decode(codes), atol=1e-5, rtol=0)
    torch.testing.assert_close(without, x - 2.5 * codes[:, group] @ sae.W_dec[group], atol=1e-5, rtol=0)
    pooled = remove_from_means(sae, x.mean(0, keepdim=True).numpy(), codes.mean(0, keepdim=True).numpy(), group, CPU)
    np.testing.assert_allclose(pooled[0], without.mean(0).numpy(), atol=1e-5)


# --- from videos to figures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def framewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shifted views of rendered videos through a tiny frame-wise backbone, and an SAE trained on them."""
    root = tmp_path_factory.mktemp("framewise")
    make_dataset(
        VideosConfig(out=root / "ssv2", videos=16, frames=20, height=64, width=64, validation_share=0, workers=1)
    )
    backbone = write_tiny_dinov2(root / "dino", image_size=32, patch_size=8, hidden=16, layers=1)
    config = {
        "dataset": {"kind": "ssv2", "root": str(root / "ssv2"), "split": "train"},
        "sampling": {"kind": "dense", "frames": 6, "stride": 2},
        "backbone": {"id": str(backbone)},
        "views": {"kind": "shifted", "patches": 1, "tubelets": 2},
        "hooks": ["blocks.-1"],
        "clips_per_shard": 48,
        "decode": {"processes": 1},
        "store": str(root / "s.zarr"),
    }
    extract_here(validate(ExtractConfig, config, "the test"))
    settings = {"steps": 40, "batch_tokens": 64, "eval_every": 40, "device": "cpu"}
    train(
        TrainConfig(
            store=str(root / "s.zarr"), out=root / "run", holdout=HoldoutConfig(fraction=0.5), sae={"k": 4}, **settings
        )  # type: ignore[arg-type]
    )
    return root


def test_temporal_scope_of_a_framewise_backbone_is_exactly_zero(framewise: Path) -> None:
    found = evaluate(EvaluateConfig(**QUICK, run=framewise / "run", store=str(framewise / "s.zarr")))
    result = found.evaluation
    assert result.figure("scope.temporal.sae").n > 20
    assert result.figure("scope.temporal.sae").value == 0.0
    assert result.figure("scope.temporal_vanished").value == 0.0
    assert result.figure("scope.temporal_threshold").value is None
    assert result.figure("scope.temporal.permuted").value > 0.01
    column = found.latent_columns["scope_temporal"].drop_null().to_numpy()
    assert (column == 0).all()
    spatial = result.figure("scope.spatial.sae")
    assert 0 < spatial.value < 1
    assert found.latent_columns["scope_spatial"].drop_null().to_numpy().mean() == pytest.approx(spatial.value)
    for name in ("monosemanticity", "monosemanticity_own", "nearest_latent", "nearest_cosine"):
        assert found.latent_columns[name].drop_null().to_numpy().size > 20
    for name in ("scope.action.raw", "scope.action_without_high.raw", "scope.action_without_low.random"):
        assert 0 <= result.figure(name).value <= 1
    assert "only reference is the backbone" in " ".join(
        note.lower() for section in result.sections if section.name == "monosemanticity" for note in section.notes
    )


def test_the_scope_store_may_be_another_one_but_must_have_shifted_views(framewise: Path, tmp_path: Path) -> None:
    shifted = open_store(str(framewise / "s.zarr"))
    plan = shifted.plan.model_copy(update={"clips": 12, "clips_per_shard": 12, "clip_table": "sha256:plain"})
    plain = make_store(tmp_path / "plain.zarr", plan).url
    options = {**QUICK, "run": framewise / "run", "store": plain, "other_store": True}
    found = evaluate(EvaluateConfig(**options, scope={"store": shifted.url})).evaluation
    assert found.figure("scope.temporal.sae").value == 0.0
    assert all(section.name != "scope" for section in evaluate(EvaluateConfig(**options)).evaluation.sections)
    with pytest.raises(TubeletError, match="no shifted views"):
        evaluate(EvaluateConfig(**options, scope={"store": plain}))
