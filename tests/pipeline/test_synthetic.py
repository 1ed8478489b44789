"""The demo data set keeps its promises: the label is in the motion, the masks are the truth, the files are SSv2's."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from tubelet.cli.main import main
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_pipeline.synthetic.actions import OPPOSITES, TEMPLATES, class_name
from tubelet_pipeline.synthetic.annotations import SPLITS, split_of
from tubelet_pipeline.synthetic.appearance import REACH, SHAPES
from tubelet_pipeline.synthetic.render_dataset import SETTINGS_FILE, VideosConfig, make_dataset
from tubelet_pipeline.synthetic.render_scene import render
from tubelet_pipeline.synthetic.scene import scene_at
from tubelet_pipeline.synthetic.video_files import H264_MP4, VP9_WEBM, Encoding, encode, mask_path, read_masks

Frames = NDArray[np.uint8]


def video(index: int, seed: int = 0, frames: int = 24, height: int = 64, width: int = 64) -> tuple[Frames, Frames]:
    return render(scene_at(seed, index, frames, height, width))


# Determinism


@pytest.mark.parametrize("index", range(len(TEMPLATES)))
def test_a_video_is_a_function_of_seed_and_index(index: int) -> None:
    frames, masks = video(index)
    again, masks_again = video(index)
    np.testing.assert_array_equal(frames, again)
    np.testing.assert_array_equal(masks, masks_again)
    # Another scene, not merely other camera noise (which would differ by 2.3 gray levels on average).
    assert np.abs(video(index, seed=1)[0].astype(int) - frames).mean() > 4
    assert np.abs(video(index + len(TEMPLATES))[0].astype(int) - frames).mean() > 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5000), st.sampled_from([(32, 32), (48, 96), (96, 48), (64, 64)]))
def test_any_scene_can_be_drawn_and_shows_its_objects(seed: int, index: int, size: tuple[int, int]) -> None:
    scene = scene_at(seed, index, 9, *size)
    frames, masks = render(scene)
    assert frames.shape == (9, *size, 3)
    assert masks.shape == (9, *size)
    assert (frames.dtype, masks.dtype) == (np.uint8, np.uint8)
    assert set(np.unique(masks)) - {0} == set(range(1, len(scene.actors) + 1))
    assert "[" not in scene.caption


# Masks


@pytest.mark.parametrize("index", range(0, 4 * len(TEMPLATES), 3))
def test_masks_are_where_the_frame_differs_from_its_background(index: int) -> None:
    scene = scene_at(0, index, 16, 96, 96)
    frames, masks = render(scene)
    background, no_masks = render(replace(scene, actors=()))
    assert not no_masks.any()
    difference = np.abs(frames.astype(int) - background).sum(axis=3)

    # An anti-aliased edge reaches half a pixel beyond the mask, at the tips of a crescent up to four.
    near = maximum_filter(masks, (1, 9, 9)) > 0
    fading = any((actor.track.opacity < 1).any() for actor in scene.actors)
    if not fading:
        assert difference[~near].max() == 0
    # Half an object's color is at least half the contrast to the background; single pixels of a pattern may match it.
    assert np.quantile(difference[masks > 0], 0.05) > 20


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_the_circle_they_claim(name: str) -> None:
    y, x = np.mgrid[-2:2:201j, -2:2:201j].astype(np.float32)
    inside = SHAPES[name](x, y) < 0
    assert inside.any()
    assert np.hypot(x, y)[inside].max() <= REACH


@pytest.mark.parametrize("index", range(0, 8 * len(TEMPLATES), 5))
def test_objects_stay_inside_the_frame(index: int) -> None:
    _, masks = video(index, frames=16, height=96, width=128)
    for border in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert not border.any()


# The label is in the motion, and nowhere else


@pytest.mark.parametrize("pair", range(len(OPPOSITES)))
@pytest.mark.parametrize("scene", [0, 1])
def test_opposed_classes_are_made_of_the_same_single_frames(pair: int, scene: int) -> None:
    index = scene * len(TEMPLATES) + 2 * pair
    forward, forward_masks = video(index)
    backward, backward_masks = video(index + 1)
    if OPPOSITES[pair].twin_is_frozen:
        shown = {frame.tobytes() for frame in forward}
        assert {frame.tobytes() for frame in backward} < shown
    else:
        np.testing.assert_array_equal(backward, forward[::-1])
        np.testing.assert_array_equal(backward_masks, forward_masks[::-1])


def nearest_mean_accuracy(samples: NDArray[np.float64]) -> float:
    """Learn class means from half of `samples` [2 classes, videos, features]; the share of the other half it names."""
    half = samples.shape[1] // 2
    distance = np.linalg.norm(samples[:, half:, None] - samples[:, :half].mean(axis=1), axis=3)
    return float((distance.argmin(axis=2) == np.array([[0], [1]])).mean())


def test_single_frames_do_not_tell_opposed_classes_apart() -> None:
    """A classifier that names most videos by their last frame is at chance on a frame from anywhere in the video."""
    rng = np.random.default_rng(0)
    scenes, frames = 60, 8
    accuracies: dict[str, list[float]] = {"any frame": [], "any mask": [], "last mask": []}
    for pair in range(len(OPPOSITES)):
        pixels = np.empty((2, scenes, 16 * 16 * 3))
        masks = np.empty((2, 2, scenes, 16 * 16))
        for scene in range(scenes):
            for side in (0, 1):
                index = scene * len(TEMPLATES) + 2 * pair + side
                pictures, objects = video(index, frames=frames, height=32, width=32)
                at = rng.integers(frames)
                pixels[side, scene] = pictures[at].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).ravel()
                for kind, t in enumerate((at, -1)):
                    masks[kind, side, scene] = (objects[t] == 1).reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel()
        accuracies["any frame"].append(nearest_mean_accuracy(pixels))
        accuracies["any mask"].append(nearest_mean_accuracy(masks[0]))
        accuracies["last mask"].append(nearest_mean_accuracy(masks[1]))
    # Four standard deviations of a fair coin, thrown once per tested video.
    margin = 4 * 0.5 / np.sqrt(len(OPPOSITES) * scenes)
    assert abs(np.mean(accuracies["any frame"]) - 0.5) < margin
    assert abs(np.mean(accuracies["any mask"]) - 0.5) < margin
    # Left and right, up and down, toward and away, appear and vanish end differently; the others do not.
    assert np.mean([accuracies["last mask"][pair] for pair in (0, 1, 2, 4)]) > 0.85


@pytest.mark.parametrize("index", range(10 * len(TEMPLATES)))
def test_the_motion_of_the_masks_gives_the_label(index: int) -> None:
    scene = scene_at(3, index, 48, 64, 64)
    assert class_name(name_motion(render(scene)[1])) == class_name(scene.template)


def name_motion(masks: Frames) -> str:
    """The template of a video, from nothing but its masks [frames, 64, 64]: ground truth is in the pixels."""
    first_area = (masks == 1).sum(axis=(1, 2))
    if (first_area == 0).any():
        return "Making [something] appear" if first_area[0] == 0 else "Making [something] vanish"
    x, y = centroids(masks == 1)
    if (masks == 2).any():
        # A mover may hide some of a resting object, but hardly moves its centroid.
        other_x, other_y = centroids(masks == 2)
        if travel(other_x, other_y) > 8 and np.ptp((masks == 2).sum(axis=(1, 2))) < 0.3 * (masks == 2).sum() / len(x):
            gap = np.hypot(x - other_x, y - other_y)
            closer = gap[-1] < gap[0]
            return f"Moving [something] and [something] {'closer to' if closer else 'away from'} each other"
    growth = np.log(first_area[-1] / first_area[0])
    if abs(growth) > 0.8:
        return f"Moving [something] {'toward' if growth > 0 else 'away from'} the camera"
    turned = turn(masks == 1)
    if abs(turned) > np.deg2rad(60):
        return f"Turning [something] {'clockwise' if turned > 0 else 'counter-clockwise'}"
    if travel(x, y) < 3:
        return "Holding [something] still"
    # The enclosed area is positive for a clockwise path, since y points down.
    enclosed = 0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    if abs(enclosed) > 0.03 * travel(x, y) ** 2:
        return f"Moving [something] in a circle {'clockwise' if enclosed > 0 else 'counter-clockwise'}"
    dx, dy = x[-1] - x[0], y[-1] - y[0]
    if np.hypot(dx, dy) < 0.7 * travel(x, y):
        return "Shaking [something]"
    if abs(dx) > abs(dy):
        return f"Moving [something] {'left' if dx < 0 else 'right'}"
    return f"Moving [something] {'up' if dy < 0 else 'down'}"


def centroids(visible: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = np.mgrid[: visible.shape[1], : visible.shape[2]]
    area = visible.sum(axis=(1, 2))
    return (visible * columns).sum(axis=(1, 2)) / area, (visible * rows).sum(axis=(1, 2)) / area


def travel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.hypot(np.diff(x), np.diff(y)).sum())


def turn(visible: NDArray[np.bool_]) -> float:
    """Radians that an outline turns, clockwise, 0 where it does not turn steadily.

    Read from the phase of its strongest rotational moment of order 2 to 5.
    """
    rows, columns = np.mgrid[: visible.shape[1], : visible.shape[2]]
    x, y = centroids(visible)
    arm = (columns - x[:, None, None]) + 1j * (rows - y[:, None, None])
    strongest, turned = 0.0, 0.0
    for order in (2, 3, 4, 5):
        moment = (visible * arm**order).sum(axis=(1, 2)) + 1e-9
        strength = float(np.abs(moment).mean() / (visible * np.abs(arm) ** order).sum(axis=(1, 2)).mean())
        if strength > strongest:
            strongest = strength
            steps = np.angle(moment[1:] / moment[:-1])
            steady = abs(steps.sum()) > 0.8 * np.abs(steps).sum()
            turned = float(steps.sum()) / order if steady else 0.0
    return turned


# Files


@pytest.mark.parametrize("encoding", [VP9_WEBM, H264_MP4], ids=lambda e: e.codec)
def test_encoding_is_faithful_and_its_bytes_repeat(tmp_path: Path, encoding: Encoding) -> None:
    frames, _ = video(4, frames=30)
    paths = [tmp_path / f"{name}{encoding.suffix}" for name in ("one", "two")]
    for path in paths:
        encode(path, frames, 12, encoding)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    decoded = decode(paths[0])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    assert [p.name for p in sorted(tmp_path.iterdir())] == sorted(p.name for p in paths)


def decode(path: Path) -> Frames:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12
        return np.stack([np.asarray(f.to_ndarray(format="rgb24"), np.uint8) for f in container.decode(video=0)])


def small(out: Path, **fields: object) -> VideosConfig:
    size = {"videos": 50, "frames": 12, "height": 64, "width": 64, "workers": 1}
    return validate(VideosConfig, {"out": str(out), **size, **fields}, "test")


@pytest.fixture(scope="module")
def ssv2(tmp_path_factory: pytest.TempPathFactory) -> VideosConfig:
    config = small(tmp_path_factory.mktemp("ssv2"), test_share=0.1)
    make_dataset(config)
    return config


def test_ssv2_labels_are_laid_out_as_the_original(ssv2: VideosConfig) -> None:
    labels = json.loads((ssv2.out / "labels/labels.json").read_text())
    assert len(labels) == len(TEMPLATES) >= 12
    assert sorted(map(int, labels.values())) == list(range(len(TEMPLATES)))
    assert not any("[" in name for name in labels)
    ids: list[str] = []
    for split in SPLITS:
        for record in json.loads((ssv2.out / f"labels/{split}.json").read_text()):
            ids.append(record["id"])
            if split == "test":
                assert set(record) == {"id"}
                continue
            assert list(record) == ["id", "label", "template", "placeholders"]
            assert record["template"].replace("[", "").replace("]", "") in labels
            caption = record["template"]
            for phrase in record["placeholders"]:
                caption = caption.replace("[something]", phrase, 1)
            assert record["label"] == caption
    assert sorted(ids, key=int) == [str(n) for n in range(1, ssv2.videos + 1)]
    files = {path.name for path in (ssv2.out / "20bn-something-something-v2").iterdir()}
    assert files == {f"{video_id}.webm" for video_id in ids}


def test_ssv2_files_hold_the_frames_and_masks_of_their_scene(ssv2: VideosConfig) -> None:
    for index in range(0, ssv2.videos, 7):
        frames, masks = video(index, frames=ssv2.frames)
        decoded = decode(ssv2.out / f"20bn-something-something-v2/{index + 1}.webm")
        assert decoded.shape == frames.shape
        assert np.abs(decoded.astype(int) - frames).mean() < 5
        np.testing.assert_array_equal(read_masks(ssv2.out, str(index + 1)), masks)


def test_kinetics_files_are_where_the_official_csv_expects_them(tmp_path: Path) -> None:
    config = small(tmp_path / "k", layout="kinetics", videos=32, test_share=0.2)
    make_dataset(config)
    seen = 0
    for split in ("train", "val", "test"):
        with (config.out / f"annotations/{split}.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            assert reader.fieldnames == ["label", "youtube_id", "time_start", "time_end", "split"]
            for row in reader:
                assert row["split"] == split
                assert " " in row["label"]
                assert len(row["youtube_id"]) == 11
                name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                assert len(decode(config.out / split / row["label"] / f"{name}.mp4")) == config.frames
                assert len(read_masks(config.out, name)) == config.frames
                seen += 1
    assert seen == len(list(config.out.rglob("*.mp4"))) == config.videos


@given(st.integers(1, 200), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_every_prefix_keeps_the_shares_of_the_splits(count: int, validation: float, test: float) -> None:
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    splits = [split_of(nth, shares) for nth in range(count)]
    for split in SPLITS:
        assert abs(splits.count(split) - shares[split] * count) < 2


@given(st.integers(1, 60), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_of_two_splits_each_gets_the_nearest_whole_number_of_videos(count: int, validation: float) -> None:
    shares = {"train": 1 - validation, "validation": validation, "test": 0.0}
    in_validation = [split_of(nth, shares) for nth in range(count)].count("validation")
    assert abs(in_validation - validation * count) <= 0.5 + 1e-6


def test_shares_that_few_videos_cannot_give_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--videos", "32", "--frames", "8", "--height", "32", "--width", "32", "--workers", "1"]
    assert main(["videos", str(tmp_path / "few"), *few, "--validation_share", "0.3"]) == 0
    shown = capsys.readouterr()
    assert "16 train, 16 validation" in shown.out
    assert "validation share 50.0 % instead of 30.0 %" in shown.out
    assert "rendering" not in shown.out
    assert "rendering" in shown.err
    assert main(["videos", str(tmp_path / "half"), *few, "--validation_share", "0.5"]) == 0
    assert "instead of" not in capsys.readouterr().out


def test_a_restart_keeps_what_is_done_and_makes_what_is_missing(tmp_path: Path) -> None:
    config = small(tmp_path / "data", videos=8)
    make_dataset(config)
    folder = config.out / "20bn-something-something-v2"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    labels = (config.out / "labels/train.json").read_bytes()
    (folder / "3.webm").unlink()
    mask_path(config.out, "5").unlink()

    rendered: list[bool] = []
    make_dataset(config, rendered.append)

    assert [index for index, new in enumerate(rendered) if new] == [2, 4]
    for name, (content, written_ns) in before.items():
        assert (folder / name).read_bytes() == content
        assert ((folder / name).stat().st_mtime_ns == written_ns) == (name not in ("3.webm", "5.webm"))
    assert (config.out / "labels/train.json").read_bytes() == labels


def test_a_longer_data_set_only_adds_videos(tmp_path: Path) -> None:
    make_dataset(small(tmp_path / "data", videos=4))
    rendered: list[bool] = []
    make_dataset(small(tmp_path / "data", videos=6), rendered.append)
    assert rendered == [False] * 4 + [True] * 2


def test_other_settings_or_other_files_are_not_mixed_in(tmp_path: Path) -> None:
    make_dataset(small(tmp_path / "data", videos=2))
    with pytest.raises(TubeletError, match="seed 0 there, 7 now"):
        make_dataset(small(tmp_path / "data", videos=2, seed=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(TubeletError, match="is not empty"):
        make_dataset(small(tmp_path / "other"))
    assert not (tmp_path / "other" / SETTINGS_FILE).exists()


def test_damaged_and_missing_masks_are_named(tmp_path: Path) -> None:
    config = small(tmp_path / "data", videos=1)
    make_dataset(config)
    with pytest.raises(TubeletError, match=r"No masks at .*77\.npz"):
        read_masks(config.out, "77")
    path = mask_path(config.out, "1")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TubeletError, match=r"1\.npz is damaged"):
        read_masks(config.out, "1")


def test_the_verb_renders_in_several_processes_the_same_files_as_in_one(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tubelet.cli.main import run_verb\nfrom tubelet_pipeline.verbs import VIDEOS\n"
        "if __name__ == '__main__': sys.exit(run_verb(VIDEOS, sys.argv[1:]))\n"
    )
    script = tmp_path / "videos.py"
    script.write_text(code)
    words = ["--videos", "10", "--frames", "12", "--height", "64", "--width", "64", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "two"), *words], capture_output=True, text=True, check=True
    )
    assert "10 videos" in done.stdout
    make_dataset(small(tmp_path / "one", videos=10))
    one, two = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
