"""The pictures a demo backbone learns from: videos of the demo's generator, of another seed, as the demo will see them.

    scene ──render 128 px──▶ frames ──VP9──▶ decoded frames ──resize──▶ uint8 [video, 48, 3, 64, 64]

Every video passes through the codec, because the backbone will never see one that did not. Of twins only the first is
rendered, where the second is the first played backwards: playing clips backwards is an augmentation here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_pipeline.preprocess import Preprocessing
from tubelet_pipeline.synthetic.actions import OPPOSITES, TEMPLATES
from tubelet_pipeline.synthetic.render import render
from tubelet_pipeline.synthetic.render_dataset import VideosConfig
from tubelet_pipeline.synthetic.scene import scene_at
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
