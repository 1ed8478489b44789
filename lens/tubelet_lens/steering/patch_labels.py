"""Class of each patch of a clip, from the ground-truth masks that `tubelet videos` writes.

    masks [frames, H, W], the frames and crop that the backbone saw ─▶ share of each class in each token's box ─▶ label

A mask numbers the objects: 1 and 2 are those of the caption's placeholders in order, so the caption gives their color
and shape. Pixels of further objects have no class, because nothing describes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_lens.steering.clip_source import Clip
from tubelet_pipeline.synthetic.appearance import OBJECT_COLORS, SHAPES
from tubelet_pipeline.synthetic.video_files import mask_path, read_masks
from tubelet_store.plan import Grid

Kind = Literal["color", "shape", "object"]
BACKGROUND = 0
CLASSES: dict[Kind, tuple[str, ...]] = {
    "color": ("background", *OBJECT_COLORS),
    "shape": ("background", *SHAPES),
    "object": ("background", "object"),
}
"""Class names; the first is the background."""

NONE = -1
"""Label of a token of which no class covers enough."""


@dataclass(frozen=True)
class Described:
    """Description of a video in the clip table.

    Attributes:
        video_id: Its id, which names its masks.
        template: The class's name, "something" for each placeholder; None if unknown.
        caption: The same with the placeholders filled; None if unknown.
    """

    video_id: str
    template: str | None
    caption: str | None


def has_masks(root: str, video_id: str) -> bool:
    """Whether the data set at `root` has masks of the video; False for a remote one."""
    return "://" not in root and mask_path(Path(root), video_id).is_file()


def phrases(described: Described) -> tuple[str, ...]:
    """Phrases in the template's placeholders, in order; empty if the caption does not follow the template."""
    if described.template is None or described.caption is None:
        return ()
    pattern = "(.+?)".join(map(re.escape, described.template.split("something")))
    match = re.fullmatch(pattern, described.caption, flags=re.IGNORECASE)
    return match.groups() if match is not None else ()


def mask_classes(kind: Kind, described: Described) -> list[int]:
    """Class of mask values 1, 2, ...; further values have none, except for "object"."""
    if kind == "object":
        return [1] * 255
    names = CLASSES[kind]
    words = [phrase.split() for phrase in phrases(described)]
    # "a red striped circle": article, color, perhaps a texture, shape.
    last = [each[1] if kind == "color" and len(each) > 1 else each[-1] for each in words]
    return [names.index(word) if word in names[1:] else NONE for word in last]


def patch_labels(
    root: str, described: Described, clip: Clip, grid: Grid, kind: Kind, threshold: float
) -> NDArray[np.int64]:
    """int64 [T', S] Class of each token, `NONE` if the most common one covers less than `threshold` of its box.

    A token's box is its patch over the frames of its latent step, within the crop. A pixel belongs to the patch that
    contains its center.

    Args:
        root: Folder of the data set.
        described: The video.
        clip: The clip.
        grid: Of the backbone.
        kind: Which classes.
        threshold: Share of the pixels; those of unknown objects count in the total.

    Raises:
        TubeletError: there are no masks, or their size differs from the video's.
    """
    masks_THW = read_masks(root, described.video_id)
    height, width = clip.frames.shape[1:3]
    if masks_THW.shape[1:] != (height, width) or clip.frame_indices.max() >= len(masks_THW):
        raise TubeletError(
            f"The masks of video {described.video_id} are {list(masks_THW.shape)}; the video has frames of "
            f"{height} x {width}, up to frame {clip.frame_indices.max()}",
            "Render videos and masks again with `tubelet videos`",
        )
    names = CLASSES[kind]
    class_of = np.full(256, len(names), dtype=np.int64)  # one more: unknown
    class_of[0] = BACKGROUND
    for value, number in enumerate(mask_classes(kind, described)[:255], start=1):
        class_of[value] = number if number != NONE else len(names)
    class_THW = class_of[masks_THW[clip.frame_indices]]
    row_H = _cells(height, clip.crop.top, clip.crop.height, grid.height)
    column_W = _cells(width, clip.crop.left, clip.crop.width, grid.width)
    step_T = np.arange(len(class_THW)) * grid.time // len(class_THW)
    inside_HW = (row_H >= 0)[:, None] & (column_W >= 0)
    token_THW = step_T[:, None, None] * grid.space + (row_H[:, None] * grid.width + column_W)[None]
    inside_THW = np.broadcast_to(inside_HW, class_THW.shape)
    cell = token_THW[inside_THW] * (len(names) + 1) + class_THW[inside_THW]
    counts_NC = np.bincount(cell, minlength=grid.tokens * (len(names) + 1)).reshape(grid.tokens, len(names) + 1)
    modal_N = counts_NC.argmax(axis=1)
    share_N = counts_NC.max(axis=1) / np.maximum(counts_NC.sum(axis=1), 1)
    clear_N = (share_N >= threshold) & (modal_N < len(names)) & (counts_NC.sum(axis=1) > 0)
    return np.where(clear_N, modal_N, NONE).reshape(grid.time, grid.space)


def _cells(pixels: int, start: float, length: float, cells: int) -> NDArray[np.int64]:
    """Cell of each pixel's center along one axis; -1 outside the crop."""
    place = np.floor((np.arange(pixels) + 0.5 - start) / length * cells).astype(np.int64)
    return np.where((place >= 0) & (place < cells), place, -1)
