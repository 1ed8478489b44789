"""The demo data set: its configuration, and rendering it video by video, the annotation files last.

A video is done when its file has its final name; its masks are written before it. A run that was killed is continued by
running it again, and every video that the annotation files name exists.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_pipeline.synthetic.actions import TEMPLATES
from tubelet_pipeline.synthetic.annotations import LAYOUTS, Entry, Split, split_of, write_annotations
from tubelet_pipeline.synthetic.render_scene import render
from tubelet_pipeline.synthetic.scene import scene_at
from tubelet_pipeline.synthetic.video_files import H264_MP4, VP9_WEBM, Encoding, encode, mask_path, write_masks


class VideosConfig(Config):
    """Configuration of `tubelet videos`."""

    out: Path
    """Folder of the data set; created if missing. An interrupted run is continued."""
    videos: int = Field(240, ge=1)
    """Number of videos. Classes are balanced if it is a multiple of 16; a larger number only adds videos."""
    seed: int = Field(0, ge=0)
    """Seed of every random choice."""
    layout: Literal["ssv2", "kinetics"] = "ssv2"
    """ssv2: VP9 webm files, JSON labels. kinetics: H.264 mp4 files in class folders, CSV labels."""
    frames: int = Field(48, ge=8, le=4096)
    """Frames of each video."""
    fps: int = Field(12, ge=1, le=120)
    """Frames per second."""
    height: int = Field(128, ge=32, le=2160, multiple_of=2)
    """Pixels."""
    width: int = Field(128, ge=32, le=3840, multiple_of=2)
    """Pixels."""
    validation_share: float = Field(0.3, ge=0, le=1)
    """Share of each class in the validation split, to the nearest whole video of each class."""
    test_share: float = Field(0.0, ge=0, le=1)
    """Share of each class in the test split, which has no labels in SSv2's layout."""
    workers: int | None = Field(None, ge=1)
    """Rendering processes. None: one per core."""

    @model_validator(mode="after")
    def _shares_fit(self) -> VideosConfig:
        if self.validation_share + self.test_share > 1:
            raise ValueError("validation_share and test_share together are more than 1")
        return self

    def fixed(self) -> dict[str, object]:
        """The fields that determine the videos; they cannot change between runs into one folder."""
        return self.model_dump(mode="json", exclude={"out", "videos", "workers"})


SETTINGS_FILE = "tubelet-videos.yaml"
"""Settings of the data set in this folder; later runs must have the same."""

ENCODINGS: dict[str, Encoding] = {e.suffix: e for e in (VP9_WEBM, H264_MP4)}


def make_dataset(config: VideosConfig, on_video: Callable[[bool], None] = lambda _: None) -> list[Entry]:
    """Render, encode and annotate the data set; existing videos are kept.

    With more than one worker the calling script needs `if __name__ == "__main__"`: processes are spawned.

    Args:
        config: The data set.
        on_video: Called after each video, with True if it was rendered and False if it existed.

    Returns:
        The entries, in the order of their index.

    Raises:
        TubeletError: the folder has other content, or videos with other settings; a rendering process ended.
    """
    _claim(config)
    workers = min(config.workers or os.cpu_count() or 1, config.videos)
    entries = []
    for entry, rendered in _make_all(config, workers):
        entries.append(entry)
        on_video(rendered)
    write_annotations(config.out, LAYOUTS[config.layout], entries)
    return entries


def _make_all(config: VideosConfig, workers: int) -> Iterator[tuple[Entry, bool]]:
    task = partial(make_video, config)
    if workers == 1:
        yield from map(task, range(config.videos))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(task, range(config.videos), chunksize=4)
        except BrokenProcessPool as error:
            raise TubeletError(
                "A rendering process ended (out of memory, or killed)",
                "Run the same command again: finished videos are kept; fewer --workers need less memory",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def make_video(config: VideosConfig, index: int) -> tuple[Entry, bool]:
    """Render video `index` unless it exists; the flag says whether it was rendered."""
    scene = scene_at(config.seed, index, config.frames, config.height, config.width)
    shares: dict[Split, float] = {
        "train": 1 - config.validation_share - config.test_share,
        "validation": config.validation_share,
        "test": config.test_share,
    }
    entry = Entry(
        index=index,
        seed=config.seed,
        split=split_of(index // len(TEMPLATES), shares),
        template=scene.template,
        placeholders=scene.placeholders,
        duration_s=config.frames / config.fps,
    )
    layout = LAYOUTS[config.layout]
    video_id, path = layout.video_id(entry), config.out / layout.video_path(entry)
    if path.is_file() and mask_path(config.out, video_id).is_file():
        return entry, False
    frames_THWC, masks_THW = render(scene)
    write_masks(config.out, video_id, masks_THW)
    encode(path, frames_THWC, config.fps, ENCODINGS[layout.suffix])
    return entry, True


def _claim(config: VideosConfig) -> None:
    """Create the folder with its settings file, or check that it has the same settings."""
    settings = config.out / SETTINGS_FILE
    wanted = config.fixed()
    if settings.is_file():
        existing = yaml.safe_load(settings.read_text(encoding="utf-8"))
        existing = existing if isinstance(existing, dict) else {}
        differing = [
            f"{name} {existing.get(name)!r} there, {wanted[name]!r} now"
            for name in wanted
            if existing.get(name) != wanted[name]
        ]
        if differing:
            raise TubeletError(
                f"{config.out} has videos with other settings: {'; '.join(differing)}",
                "Choose another folder, or use its settings",
            )
        return
    if config.out.exists() and not config.out.is_dir():
        raise TubeletError(f"{config.out} is a file", "Choose a folder for the data set")
    if config.out.is_dir() and any(config.out.iterdir()):
        raise TubeletError(
            f"{config.out} is not empty, and `tubelet videos` did not make what is in it", "Choose another folder"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    unfinished = settings.with_name(f".{SETTINGS_FILE}.{os.getpid()}")
    unfinished.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    unfinished.replace(settings)


def dataset_bytes(root: Path) -> int:
    """Size of all files below `root`."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
