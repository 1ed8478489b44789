"""Views: what two of them share is the same to the bit, and the clip table says where each of them lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from in_process import extract_here
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.tiny import write_tiny_dinov2
from tubelet_pipeline.datasets import Folder, build_clip_table
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.frame_indices import chosen_frames
from tubelet_pipeline.plan_extraction import make_plan
from tubelet_pipeline.preprocess import Preprocessing
from tubelet_pipeline.sampling import DenseSampling, UniformSampling
from tubelet_pipeline.views import CenterView, ShiftedViews, ThreeCrops, clip_request, locate, place, views_per_window
from tubelet_store.reader import open_store

RULES = {
    "edge and crop": Preprocessing(shortest_edge=40, crop=(32, 32)),
    "edge is crop": Preprocessing(shortest_edge=32, crop=(32, 32)),
    "squeezed": Preprocessing(resize_to=(32, 32)),
    "crop alone": Preprocessing(crop=(32, 32)),
    "oblong": Preprocessing(shortest_edge=48, crop=(48, 32)),
}


def pixels_of(views, rule, frames, patch=8):
    places = [place(views, locate(views, number), (patch, patch)) for number in range(views_per_window(views))]
    return [rule(frames, where) for where in places]


@given(
    rule=st.sampled_from(sorted(RULES)),
    height=st.integers(60, 130),
    width=st.integers(60, 130),
    shift=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_shifted_crops_are_the_same_pixels_where_they_overlap(rule, height, width, shift):
    frames = np.random.default_rng(height * width).integers(0, 256, (1, height, width, 3), np.uint8)
    (there, box), (shifted, shifted_box) = pixels_of(ShiftedViews(patches=shift), RULES[rule], frames)
    assert there.shape[-2:] == shifted.shape[-2:] == RULES[rule].size
    by = 8 * shift
    np.testing.assert_array_equal(there[..., by:, by:], shifted[..., :-by, :-by])
    assert not np.array_equal(there, shifted)
    down, across = box.height / there.shape[-2], box.width / there.shape[-1]
    assert shifted_box.top - box.top == pytest.approx(by * down)
    assert shifted_box.left - box.left == pytest.approx(by * across)


def test_the_shifted_frame_is_resized_to_p_plus_s_patches():
    """Science: resize to (p + s) n, crop p n, offset by s n."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 90, 3), np.uint8)
    whole, _ = Preprocessing(resize_to=(40, 40))(frames)
    (there, _), (shifted, _) = pixels_of(ShiftedViews(patches=1), RULES["edge is crop"], frames)
    np.testing.assert_array_equal(there, whole[..., :32, :32])
    np.testing.assert_array_equal(shifted, whole[..., 8:, 8:])


@given(
    frames=st.integers(1, 16), stride=st.integers(1, 4), clips=st.integers(1, 3), video=st.integers(1, 120),
    tubelets=st.integers(1, 4), uniform=st.booleans(),
)  # fmt: skip
def test_shifted_windows_take_the_same_frames_where_they_overlap(frames, stride, clips, video, tubelets, uniform):
    sampling = (
        UniformSampling(frames=frames, clips=clips)
        if uniform
        else DenseSampling(frames=frames, stride=stride, clips=clips)
    )
    views = ShiftedViews(patches=0, tubelets=tubelets)
    for window in range(clips):
        chosen = []
        for number in (2 * window, 2 * window + 1):
            request = clip_request("x", sampling, views, locate(views, number), tubelet_frames=2)
            rule = request.sampling.model_dump(mode="json")
            chosen.append(chosen_frames(rule, video, request.view, request.first, request.more))
        there, shifted = (choice.indices for choice in chosen)
        assert len(there) == len(shifted) == frames
        by = 2 * tubelets
        assert there[by:].tolist() == shifted[: max(0, frames - by)].tolist()
        assert shifted[-1] < video


def test_three_crops_are_at_the_beginning_in_the_middle_and_at_the_end():
    wide = np.random.default_rng(0).integers(0, 256, (1, 64, 128, 3), np.uint8)
    boxes = [box for _, box in pixels_of(ThreeCrops(), RULES["edge is crop"], wide)]
    assert boxes == [(0, 0, 64, 64), (0, 32, 64, 64), (0, 64, 64, 64)]
    tall = wide.transpose(0, 2, 1, 3)
    boxes = [box for _, box in pixels_of(ThreeCrops(), RULES["edge and crop"], tall)]
    edge = 64 * 32 / 40
    assert [tuple(map(float, box)) for box in boxes] == [
        pytest.approx((top, 6.4, edge, edge)) for top in (0, 38.4, 76.8)
    ]
    middle, _ = RULES["edge and crop"](tall)
    np.testing.assert_array_equal(pixels_of(ThreeCrops(), RULES["edge and crop"], tall)[1][0], middle)


def test_rows_go_by_video_then_window_then_view(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").touch()
    sampling, root = DenseSampling(frames=4, clips=2), Folder(root=str(tmp_path))
    columns = ["video_id", "view", "temporal_view", "spatial_view", "shift_patches", "shift_tubelets"]

    def rows(views):
        table = build_clip_table(root, sampling, views).select(columns)
        return [tuple(row.values()) for row in table.to_pylist()]

    assert rows(CenterView()) == [(f"{v}.mp4", i, i, 0, None, None) for v in "ab" for i in (0, 1)]
    assert [row[1:4] for row in rows(ThreeCrops())[:6]] == [(v, v // 3, v % 3) for v in range(6)]
    assert [row[2:] for row in rows(ShiftedViews(patches=2, tubelets=1))[:6]] == [
        (window, None, *shift) for window in (0, 1) for shift in ((0, 0), (2, 0), (0, 1))
    ]
    assert [row[0] for row in rows(ThreeCrops())] == ["a.mp4"] * 6 + ["b.mp4"] * 6


@pytest.fixture(scope="module")
def image_backbone(tmp_path_factory) -> Path:
    return write_tiny_dinov2(tmp_path_factory.mktemp("dino") / "tiny", image_size=32, patch_size=8, hidden=16, layers=1)


def config(job_settings, store: Path, **changes) -> ExtractConfig:
    tree = {**job_settings, "store": str(store), **changes}
    return validate(ExtractConfig, tree, "the test")


def test_every_choice_of_views_is_another_plan(job_settings, tmp_path):
    plans = [
        make_plan(config(job_settings, tmp_path / "s", views=views)).plan
        for views in (
            {"kind": "center"},
            {"kind": "three_crops"},
            {"kind": "shifted", "patches": 1},
            {"kind": "shifted", "patches": 2},
            {"kind": "shifted", "patches": 1, "tubelets": 1},
        )
    ]
    assert len({plan.digest for plan in plans}) == 5
    assert "views" not in plans[0].sampling
    assert plans[4].sampling["views"]["tubelet_frames"] == 2
    assert [plan.clips for plan in plans] == [26, 78, 52, 52, 78]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"views": {"kind": "shifted", "patches": 4}}, "views.patches to less than 4"),
        ({"views": {"kind": "shifted", "patches": 1, "tubelets": 4}}, "views.tubelets to less than 4"),
        ({"views": {"kind": "shifted"}, "tokens": {"kind": "patches", "keep": 3}}, "tokens.kind: all"),
    ],
)
def test_views_that_share_nothing_are_refused(job_settings, tmp_path, changes, words):
    with pytest.raises(TubeletError, match=words):
        make_plan(config(job_settings, tmp_path / "s", **changes))


def test_a_frame_resized_to_a_fixed_size_has_no_longer_side(job_settings, backbone, tmp_path):
    squeezed = {"id": str(backbone), "preprocessing": {"resize_to": [32, 32]}}
    with pytest.raises(TubeletError, match="no longer side"):
        make_plan(config(job_settings, tmp_path / "s", backbone=squeezed, views={"kind": "three_crops"}))


def test_a_shift_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing is shifted"):
        ShiftedViews(patches=0)


def test_shifted_views_of_a_framewise_backbone_agree_exactly_in_time(job_settings, image_backbone, tmp_path):
    """Its features know nothing of time, so the overlap of two windows is the same to the bit: the built-in control."""
    settings = config(
        job_settings,
        tmp_path / "s.zarr",
        dataset={**job_settings["dataset"], "limit": 3},
        backbone={"id": str(image_backbone)},
        views={"kind": "shifted", "patches": 1, "tubelets": 2},
        hooks=["blocks.-1"],
        clips_per_shard=9,
        batch_size="auto",
    )
    extract_here(settings)
    store = open_store(str(tmp_path / "s.zarr"))
    values, table = store.shard_map("blocks.0", 0), store.clips().to_pylist()
    assert store.commit_record(0).software["batch_size"] == "8"
    assert all(row["status"] == "ok" for row in table)
    for there, moved, later in zip(*(range(k, 9, 3) for k in range(3)), strict=True):
        assert [table[i]["shift_patches"] for i in (there, moved, later)] == [0, 1, 0]
        assert [table[i]["shift_tubelets"] for i in (there, moved, later)] == [0, 0, 2]
        assert table[there]["frame_indices"] == table[moved]["frame_indices"]
        assert table[there]["frame_indices"][2:] == table[later]["frame_indices"][:-2]
        np.testing.assert_array_equal(values[there][2:], values[later][:-2])
        assert table[moved]["crop"][0] > table[there]["crop"][0]
        assert not np.array_equal(values[there], values[moved])


def test_crops_of_the_same_frames_are_decoded_once(job_settings, tmp_path, monkeypatch):
    from tubelet_pipeline.decode.pool import DecodePool

    asked = []
    submit = DecodePool._submit
    monkeypatch.setattr(DecodePool, "_submit", lambda self, request: asked.append(request) or submit(self, request))
    dataset = {**job_settings["dataset"], "limit": 3}
    settings = config(
        job_settings, tmp_path / "s.zarr", dataset=dataset, views={"kind": "three_crops"}, clips_per_shard=9
    )
    extract_here(settings)
    assert len(asked) == 3
    table = open_store(str(tmp_path / "s.zarr")).clips().to_pylist()
    assert [row["frame_indices"] == table[3 * (i // 3)]["frame_indices"] for i, row in enumerate(table)] == [True] * 9
