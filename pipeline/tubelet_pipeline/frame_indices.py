"""Which frames a clip takes from a video: two formulas in integer arithmetic.

This file imports only numpy: decode processes, which must start fast, choose the frames, because only they know how
many a video has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameChoice:
    """Frames of one clip.

    Attributes:
        indices: int64 [frames], display order, in range(video_frames), never decreasing.
        padded: How many of them repeat a frame, because the video is too short.
    """

    indices: NDArray[np.int64]
    padded: int


def dense_frames(
    video_frames: int, *, frames: int, stride: int, clips: int, view: int, first: int, more: int
) -> FrameChoice:
    """`frames` frames, `stride` apart: `min(start + i * stride, n - 1)`.

    The span is `frames * stride`. One view is centered, `start = max(0, (n - span) // 2)`; of several, view v
    starts at `v * max(0, n - span) // (clips - 1)`. Indices past the end repeat the last frame; `padded` counts them.

    With `more`, the formula is applied to `frames + more` frames, and `frames` of them are taken from `first` on:
    windows that differ only in `first` share frames.
    """
    _check(video_frames, clips, view, first, more)
    slack = max(0, video_frames - (frames + more) * stride)
    start = slack // 2 if clips == 1 else view * slack // (clips - 1)
    wanted = start + stride * np.arange(first, first + frames, dtype=np.int64)
    return FrameChoice(np.minimum(wanted, video_frames - 1), int((wanted >= video_frames).sum()))


def uniform_frames(video_frames: int, *, frames: int, clips: int, view: int, first: int, more: int) -> FrameChoice:
    """One frame from each of `frames` equal bins: `floor((i + (v + 1/2) / V) * n / T)`.

    One view takes the bin centers (TSN's test sampling). A video with fewer frames than bins repeats frames; `padded`
    counts the indices that equal their predecessor. `first` and `more` as for `dense_frames`: of `frames + more` bins.
    """
    _check(video_frames, clips, view, first, more)
    bins = np.arange(first, first + frames, dtype=np.int64)
    indices = (2 * clips * bins + 2 * view + 1) * video_frames // (2 * clips * (frames + more))
    return FrameChoice(indices, int((indices[1:] == indices[:-1]).sum()))


_FORMULAS: dict[str, Callable[..., FrameChoice]] = {"dense": dense_frames, "uniform": uniform_frames}


def chosen_frames(rule: Mapping[str, str | int], video_frames: int, view: int, first: int, more: int) -> FrameChoice:
    """Frames by the formula of `rule`, a sampling as JSON."""
    fields = {name: value for name, value in rule.items() if name != "kind"}
    return _FORMULAS[str(rule["kind"])](video_frames, **fields, view=view, first=first, more=more)


def _check(video_frames: int, clips: int, view: int, first: int, more: int) -> None:
    if video_frames < 1:
        raise ValueError(f"A video of {video_frames} frames has none to choose")
    if not 0 <= view < clips:
        raise ValueError(f"View {view} is not one of the {clips} views")
    if not 0 <= first <= more:
        raise ValueError(f"A window that begins at frame {first} does not fit into one that is {more} frames longer")
