"""What a single frame shows, patch by patch, told by the generator: the targets of the frame-wise backbone.

A patch belongs to the object that covers most of it, if that is at least a quarter of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus import FRAMES, SEED, SIDE, indices
from tubelet_pipeline.synthetic.appearance import OBJECT_COLORS, SHAPES, TEXTURES
from tubelet_pipeline.synthetic.render import render
from tubelet_pipeline.synthetic.scene import Look, scene_at

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
