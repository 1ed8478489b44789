"""Preprocessing equals the published processors, and says truthfully which part of the frame it kept."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tubelet.errors import TubeletError
from tubelet_pipeline.preprocess import Preprocessing, parse_processor, read_preprocessing

# Height x width: landscape, portrait, square, odd, tiny (upscaled), one short of the crop.
SIZES = [(240, 320), (320, 240), (96, 96), (101, 77), (24, 17), (63, 65), (64, 97)]


def picture(height: int, width: int, frames: int = 2) -> np.ndarray:
    """A smooth pattern with some noise; uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        127 + 90 * np.sin(2 * np.pi * (x / width * (c + 1) + y / height * (t + 1)))
        for t in range(frames)
        for c in range(3)
    ]
    stack = np.stack(waves).reshape(frames, 3, height, width).transpose(0, 2, 3, 1)
    return np.clip(stack + rng.normal(0, 8, stack.shape), 0, 255).astype(np.uint8)


def published(kind: str, fields: dict) -> object:
    import transformers

    return getattr(transformers, kind)(**fields)


PROCESSORS = {
    "VideoMAEImageProcessorPil": {"size": {"shortest_edge": 64}, "resample": 2, "image_mean": [0.485, 0.456, 0.406]},
    "BitImageProcessorPil": {"size": {"shortest_edge": 73}, "resample": 3, "image_mean": [0.485, 0.456, 0.406]},
    "CLIPImageProcessorPil": {"size": {"shortest_edge": 64}, "resample": 3, "image_mean": [0.48, 0.458, 0.408]},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_equals_the_published_processor(kind: str, size: tuple[int, int]) -> None:
    fields = PROCESSORS[kind] | {
        "crop_size": {"height": 64, "width": 64},
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 1 / 255,
    }
    frames = picture(*size)
    processor = published(kind, fields)
    given_frames = [list(frames)] if kind.startswith("VideoMAE") else list(frames)
    theirs = torch.as_tensor(np.asarray(processor(given_frames, return_tensors="np")["pixel_values"]))
    ours, _ = parse_processor(processor.to_dict(), "the test's file")(frames)
    # Both round to uint8 after each of the two resizing passes, with weights of different precision. Measured: at least
    # 99.08 % of the values equal, the others one step of uint8 (0.0175 here) apart, and a single value, in the frame
    # that is enlarged fourfold by bicubic, two steps (0.0342); there each lies within 1.02 steps of the exact result.
    off = (ours - theirs.reshape(ours.shape)).abs()
    assert (off < 1e-4).float().mean() > 0.99
    assert (off > 0.03).float().mean() < 1e-4
    assert off.max() < 2.05 / 255 / 0.224
    if size != (24, 17):
        assert off.max() <= 0.03


def test_equals_the_published_processor_for_exact_size() -> None:
    processor = published(
        "SiglipImageProcessorPil",
        {"size": {"height": 48, "width": 64}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )
    frames = picture(120, 90)
    theirs = torch.as_tensor(np.asarray(processor(list(frames), return_tensors="np")["pixel_values"]))
    ours, box = parse_processor(processor.to_dict(), "the test's file")(frames)
    assert ours.shape == (2, 3, 48, 64)
    assert (ours - theirs).abs().max() <= 0.03
    assert tuple(box) == (0, 0, 120, 90)


def test_vivit_offset_puts_pixels_around_zero() -> None:
    fields = {"size": {"shortest_edge": 8}, "crop_size": 8, "resample": 2, "rescale_factor": 1 / 127.5, "offset": True}
    prepare = parse_processor(fields | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "the test's file")
    frames = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (0, 255)])
    pixels, _ = prepare(frames)
    assert pixels[:, 0, 0, 0].tolist() == pytest.approx([(-1 - 0.5) / 0.5, (1 - 0.5) / 0.5], abs=1e-6)


def test_switches_are_respected() -> None:
    fields = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_center_crop": True, "crop_size": 4}
    frames = picture(6, 9)
    pixels, box = parse_processor(fields, "the test's file")(frames)
    assert torch.equal(pixels, torch.from_numpy(frames[:, 1:5, 2:6]).permute(0, 3, 1, 2).float())
    assert tuple(box) == (1, 2, 4, 4)
    with pytest.raises(TubeletError, match="3x3 pixels is smaller than the crop of 4x4"):
        parse_processor(fields, "the test's file")(picture(3, 3))


def test_a_bare_size_means_what_the_family_says() -> None:
    fields = {"size": 32, "resample": 3, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert parse_processor(fields, "x").shortest_edge == 32
    assert parse_processor(fields, "x", square=True).resize_to == (32, 32)


@settings(deadline=None, max_examples=60)
@given(st.integers(9, 400), st.integers(9, 400), st.integers(8, 80), st.data())
def test_crop_box_is_the_center_of_the_frame(height: int, width: int, edge: int, data: st.DataObject) -> None:
    crop = data.draw(st.integers(4, edge))
    frames = np.zeros((1, height, width, 3), np.uint8)
    _, box = Preprocessing(shortest_edge=edge, crop=(crop, crop))(frames)
    assert box.top >= 0
    assert box.left >= 0
    assert box.top + box.height <= height + 1e-9
    assert box.left + box.width <= width + 1e-9
    # Centered to within one resized pixel.
    assert abs(2 * box.top + box.height - height) <= height / edge + 1e-9
    assert abs(2 * box.left + box.width - width) <= width / edge + 1e-9


def test_crop_box_points_at_what_was_seen() -> None:
    frames = np.zeros((1, 80, 160, 3), np.uint8)
    pixels, box = Preprocessing(shortest_edge=40, crop=(20, 20))(frames)
    assert tuple(box) == (20, 60, 40, 40)
    frames[:, 20:60, 60:100] = 255
    pixels, _ = Preprocessing(shortest_edge=40, crop=(20, 20))(frames)
    assert pixels[0, :, 1:-1, 1:-1].min() > 0.99


def test_frames_may_be_read_only_and_are_left_alone() -> None:
    frames = picture(30, 40)
    frames.flags.writeable = False
    before = frames.copy()
    Preprocessing(shortest_edge=16, crop=(16, 16))(frames)
    assert np.array_equal(frames, before)


@pytest.mark.parametrize("frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3, 8, 8), np.uint8)])
def test_other_frames_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        Preprocessing(shortest_edge=8, crop=(8, 8))(frames)


def test_frames_of_varying_size_are_refused() -> None:
    with pytest.raises(ValidationError, match="differ in size"):
        Preprocessing(shortest_edge=224)
    with pytest.raises(ValidationError, match="does not fit"):
        Preprocessing(shortest_edge=200, crop=(224, 224))


COMPLETE = {
    "size": {"shortest_edge": 32},
    "crop_size": 32,
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@pytest.mark.parametrize("lacking", ["size", "resample", "image_mean", "image_std"])
def test_what_the_file_does_not_say_is_never_guessed(lacking: str) -> None:
    fields = {name: value for name, value in COMPLETE.items() if name != lacking}
    with pytest.raises(TubeletError, match=f"F does not say '{lacking}'"):
        parse_processor(fields, "F")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 1}, "resample 1"),
        ({"do_pad": True}, "padding"),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"crop_size": 64}, "does not fit"),
        ({"image_mean": [0.5]}, "does not fit"),
    ],
)
def test_what_is_not_done_here_is_refused(change: dict, message: str) -> None:
    with pytest.raises(TubeletError, match=message):
        parse_processor(COMPLETE | change, "F")


def test_reads_any_of_the_processor_files(tmp_path) -> None:
    with pytest.raises(TubeletError, match=r"'m' has no preprocessor_config\.json"):
        read_preprocessing(tmp_path, "'m'")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": COMPLETE}))
    assert read_preprocessing(tmp_path, "'m'").size == (32, 32)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(TubeletError, match=r"preprocessor_config\.json of 'm' is not JSON"):
        read_preprocessing(tmp_path, "'m'")


def test_needs_neither_torchvision_nor_pillow() -> None:
    code = (
        "import sys, numpy as np; from tubelet_pipeline.preprocess import Preprocessing;"
        "Preprocessing(shortest_edge=8, crop=(8, 8))(np.zeros((1, 9, 9, 3), np.uint8));"
        "assert not {'torchvision', 'PIL', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
