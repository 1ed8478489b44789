"""Training data of the demo backbones: rendered videos, augmented clips, and labels of single frames.

    scene ──render 128 px──▶ frames ──VP9──▶ decoded frames ──resize──▶ uint8 [video, 48, 3, 64, 64]

The videos come from the demo's generator with another seed. Each passes through the codec, because the backbones will
only see encoded videos. Of twins only the first is rendered, where the second is the first played backwards: playing
clips backwards is an augmentation.

Augmentations that turn one action into another of the same kind (turning, mirroring, playing backwards) make the model
learn all of them; colors, brightness and noise do not depend on the action. No label is read.

Labels of single frames, patch by patch, come from the generator; they are the targets of the frame-wise backbone. A
patch belongs to the object that covers most of it, if that is at least a quarter of the patch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_pipeline.preprocess import Preprocessing
from tubelet_pipeline.synthetic.actions import OPPOSITES, TEMPLATES
from tubelet_pipeline.synthetic.appearance import OBJECT_COLORS, SHAPES, TEXTURES
from tubelet_pipeline.synthetic.render_dataset import VideosConfig
from tubelet_pipeline.synthetic.render_scene import render
from tubelet_pipeline.synthetic.scene import Look, scene_at
from tubelet_pipeline.synthetic.video_files import VP9_WEBM, encode

SEED = 20_000
"""Of the generator; the demo's is 0. Scenes of different seeds have nothing in common but the generator."""

SIDE = 64
"""Pixels of a picture, height and width."""

FRAMES = 48
"""Of a video, as in the demo."""


def indices(videos: int) -> list[int]:
    """Numbers of the videos to render among the generator's first `videos`: no backward twins."""
    return [i for i in range(videos) if i % 2 == 0 or OPPOSITES[i % len(TEMPLATES) // 2].twin_is_frozen]


def render_corpus(videos: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Frames of `indices(videos)`, uint8 [video, FRAMES, 3, SIDE, SIDE], red first; about 0.1 s each."""
    chosen = indices(videos)
    corpus = np.empty((len(chosen), FRAMES, 3, SIDE, SIDE), np.uint8)
    for row, frames in zip(corpus, _decoded(chosen, seed), strict=True):
        row[:] = frames
    return corpus


def _decoded(chosen: list[int], seed: int) -> Iterator[NDArray[np.uint8]]:
    sizes = VideosConfig.model_fields
    height, width = int(sizes["height"].default), int(sizes["width"].default)
    shrink = Preprocessing(shortest_edge=SIDE, crop=(SIDE, SIDE), rescale=1.0)
    with tempfile.TemporaryDirectory(prefix="tubelet-corpus-") as folder:
        path = Path(folder) / f"video{VP9_WEBM.suffix}"
        for index in chosen:
            frames_THWC, _ = render(scene_at(seed, index, FRAMES, height, width))
            encode(path, frames_THWC, int(sizes["fps"].default), VP9_WEBM)
            with av.open(str(path)) as container:
                decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            yield shrink(decoded)[0].numpy().astype(np.uint8)


def open_corpus(videos: int, cache: Path | None) -> NDArray[np.uint8]:
    """`render_corpus(videos)`, kept in the file `cache` (.npy) between runs if one is named."""
    if cache is not None and cache.is_file():
        kept: NDArray[np.uint8] = np.load(cache, allow_pickle=False)
        if len(kept) != len(indices(videos)):
            raise TubeletError(f"{cache} holds {len(kept)} videos, not {len(indices(videos))}", "Delete it")
        return kept
    corpus = render_corpus(videos)
    if cache is not None:
        np.save(cache, corpus)
    return corpus


STRIDES = (3, 3, 2)
"""Drawn from evenly. The demo samples every third frame, which covers a whole video; every second one is for those who
sample otherwise."""

NOISE = 0.008
"""Largest standard deviation of the noise, pixels in 0..1. What the codec leaves of the generator's is 0.004."""


def draw_clips(
    corpus: NDArray[np.uint8], rows: NDArray[np.int64], frames: int, rng: np.random.Generator
) -> torch.Tensor:
    """One augmented clip from each of `rows` of the corpus.

    Args:
        corpus: uint8 [video, F, 3, H, W] with H = W.
        rows: int64 [B].
        frames: Frames per clip, T.
        rng: Every choice comes from it.

    Returns:
        float32 [B, T, 3, H, W] in 0..1.
    """
    return torch.stack([_augment(corpus[row], frames, rng) for row in rows])


def _augment(video: NDArray[np.uint8], frames: int, rng: np.random.Generator) -> torch.Tensor:
    stride = int(rng.choice(STRIDES))
    start = int(rng.integers(len(video) - (frames - 1) * stride))
    clip = video[start : start + (frames - 1) * stride + 1 : stride]
    if rng.random() < 0.5:
        clip = clip[::-1]
    if rng.random() < 0.5:
        clip = clip[..., ::-1]
    clip = np.rot90(clip, int(rng.integers(4)), axes=(-2, -1))
    if rng.random() < 0.5:
        clip = clip[:, rng.permutation(3)]
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).float() / 255
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.08, 0.08)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * rng.uniform(0, NOISE)
    return ((pixels - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)


VOCABULARIES = {"shape": tuple(SHAPES), "color": tuple(OBJECT_COLORS), "texture": tuple(TEXTURES)}
MOST_ACTORS = 2
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class FrameLabels:
    """Row = video of the corpus, A = `MOST_ACTORS`."""

    owner: NDArray[np.int64]
    """[N, FRAMES, G, G]: v where the patch belongs to object v - 1, 0 where to none."""
    looks: NDArray[np.int64]
    """[N, A, 3]: shape, color, texture of each object, places in `VOCABULARIES`."""
    poses: NDArray[np.float32]
    """[N, FRAMES, A, 3]: center x, center y, radius; in halves of the frame, from its center, y down."""


def frame_labels(videos: int, patch: int, seed: int = SEED) -> FrameLabels:
    """Labels of the videos that `render_corpus(videos, seed)` renders, in its order; about 20 ms each."""
    chosen = indices(videos)
    grid = SIDE // patch
    owner = np.zeros((len(chosen), FRAMES, grid, grid), np.int64)
    looks = np.zeros((len(chosen), MOST_ACTORS, 3), np.int64)
    poses = np.zeros((len(chosen), FRAMES, MOST_ACTORS, 3), np.float32)
    for row, index in enumerate(chosen):
        scene = scene_at(seed, index, FRAMES, SIDE, SIDE)
        cells_TGGK = render(scene)[1].reshape(FRAMES, grid, patch, grid, patch).swapaxes(2, 3)
        shares = np.stack([(cells_TGGK == v).mean((-2, -1)) for v in range(1, MOST_ACTORS + 1)])
        owner[row] = np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0) + 1, 0)
        for i, actor in enumerate(scene.actors):
            track = actor.track.at(scene.order)
            looks[row, i] = _numbers(actor.look)
            poses[row, :, i] = np.stack([track.x, track.y, track.radius], -1) * 2
    return FrameLabels(owner, looks, poses)


def _numbers(look: Look) -> tuple[int, ...]:
    words = (look.shape, look.color, look.texture)
    return tuple(names.index(word) for names, word in zip(VOCABULARIES.values(), words, strict=True))
