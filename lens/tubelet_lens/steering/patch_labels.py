"""What each patch of a clip shows, from the ground-truth masks that `tubelet videos` writes.

    masks [frames, H, W], the frames and crop that the backbone saw ─▶ share of each class in each token's box ─▶ label

A mask tells objects apart by number: 1, 2 fill the caption's placeholders in order, so that the caption tells their
color and shape; a further object only rests, and nothing tells what it is: its pixels have no class.
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
"""Names of the classes; the first is the background."""

NONE = -1
"""Label of a token whose box shows no one class clearly enough."""


@dataclass(frozen=True)
class Described:
    """What a clip table says of a video.

    Attributes:
        video_id: Names its masks.
        template: The class's name, "something" for each placeholder; None where unknown.
        caption: The same with the placeholders filled; None where unknown.
    """

    video_id: str
    template: str | None
    caption: str | None


def has_masks(root: str, video_id: str) -> bool:
    """Whether the data set at `root` holds masks of the video; of a remote one, no."""
    return "://" not in root and mask_path(Path(root), video_id).is_file()


def phrases(described: Described) -> tuple[str, ...]:
    """What fills the template's placeholders, in order; empty where the caption does not follow the template."""
    if described.template is None or described.caption is None:
        return ()
    pattern = "(.+?)".join(map(re.escape, described.template.split("something")))
    match = re.fullmatch(pattern, described.caption, flags=re.IGNORECASE)
    return match.groups() if match is not None else ()


def mask_classes(kind: Kind, described: Described) -> list[int]:
    """Class of mask value 1, 2, ...; values beyond have none (of "object": all are objects)."""
    if kind == "object":
        return [1] * 255
    names = CLASSES[kind]
    words = [phrase.split() for phrase in phrases(described)]
    # "a red striped circle": article, color, perhaps a texture, shape.
    said = [each[1] if kind == "color" and len(each) > 1 else each[-1] for each in words]
    return [names.index(word) if word in names[1:] else NONE for word in said]


def patch_labels(
    root: str, described: Described, shot: Clip, grid: Grid, kind: Kind, threshold: float
) -> NDArray[np.int64]:
    """int64 [T', S] Class of each token, `NONE` where the commonest covers less than `threshold` of its box.

    A token's box is its patch through the frames of its latent step, as far as the crop reaches. A pixel belongs to the
    patch that its center lies in.

    Args:
        root: Folder of the data set.
        described: Whose masks, and what its objects are.
        shot: The clip.
        grid: Of the backbone.
        kind: Which classes.
        threshold: Share of the pixels, those of unknown objects among them.

    Raises:
        TubeletError: no masks, or of another size than the video.
    """
    masks_THW = read_masks(root, described.video_id)
    height, width = shot.frames.shape[1:3]
    if masks_THW.shape[1:] != (height, width) or shot.frame_indices.max() >= len(masks_THW):
        raise TubeletError(
            f"The masks of video {described.video_id} are {list(masks_THW.shape)}; the video has frames of "
            f"{height} x {width}, up to frame {shot.frame_indices.max()}",
            "Make videos and masks anew with `tubelet videos`",
        )
    names = CLASSES[kind]
    class_of = np.full(256, len(names), dtype=np.int64)  # one more: unknown
    class_of[0] = BACKGROUND
    for value, number in enumerate(mask_classes(kind, described)[:255], start=1):
        class_of[value] = number if number != NONE else len(names)
    class_THW = class_of[masks_THW[shot.frame_indices]]
    row_H = _cells(height, shot.crop.top, shot.crop.height, grid.height)
    column_W = _cells(width, shot.crop.left, shot.crop.width, grid.width)
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
