"""Latent time: which steps repeat a frame, and how far apart two steps are.

    frames of a clip   0 1 2 3 4 5 5 5      frame_indices (the video has 6 frames)
    latent steps       |0  |1  |2  |3       tubelet = frames / steps = 2
    valid              yes yes yes no       a step that covers a repeated frame is not

Repeating a frame makes neighbors equal whatever the SAE does, so such steps enter no pair of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tubelet_store.reader import Store
from tubelet_trainer.data.pairs import fresh_steps, repeated_frames


@dataclass(frozen=True)
class LatentTime:
    """Latent time of a store.

    Attributes:
        valid_CT: bool [clips, steps] Steps that cover no repeated frame.
        step_frames: Median distance between neighboring steps in frames of the video; None where unknown.
        step_seconds: The same in seconds.
    """

    valid_CT: NDArray[np.bool_]
    step_frames: float | None
    step_seconds: float | None


def latent_time(store: Store, clips: NDArray[np.int64]) -> LatentTime:
    """Latent time of `store`; the step sizes are medians over `clips`.

    A frame repeats if its index equals its predecessor's, or if it is one of the `padded_frames` last of a dense clip
    (the first of those may be a new frame, but is at the wrong distance).

    Raises:
        TubeletError: a clip's frames do not divide into the grid's steps.
    """
    valid_CT = fresh_steps(store)
    trailing = store.plan.sampling.get("kind") != "uniform"
    step_frames, step_seconds = [], []
    wanted = np.zeros(store.plan.clips, dtype=bool)
    wanted[clips] = True
    for clip, indices, times, fps, padded in _rows(store.clips()):
        if not wanted[clip] or not indices:
            continue
        kept = np.flatnonzero(~repeated_frames(indices, padded if trailing else None))
        if len(kept) < 2:
            continue
        tubelet, last = len(indices) // store.plan.grid.time, kept[-1]
        span = (indices[last] - indices[0]) / last * tubelet
        step_frames.append(span)
        if times:
            step_seconds.append((times[last] - times[0]) / last * tubelet)
        elif fps:
            step_seconds.append(span / fps)
    return LatentTime(valid_CT, _median(step_frames), _median(step_seconds))


def _rows(table: pa.Table) -> zip[tuple[int, list[int] | None, list[float] | None, float | None, int | None]]:
    columns = ("clip", "frame_indices", "timestamps_s", "fps", "padded_frames")
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
