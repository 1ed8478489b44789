"""Where an edit acts: latent steps, and patches of the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.plan import Grid


class Region(Config):
    """A part of a clip; what is left out reaches over everything."""

    steps: tuple[int, int] | None = None
    """First latent step, and the one after the last."""
    seconds: tuple[float, float] | None = None
    """The same as times in the video: every step with a frame shown from the first time on and before the second."""
    rows: tuple[int, int] | None = None
    """First row of patches, and the one after the last."""
    columns: tuple[int, int] | None = None
    """First column of patches, and the one after the last."""
    mask: Path | None = None
    """Array of bool (.npy) [rows, columns] or [steps, rows, columns] of patches; cuts out of the rest."""

    @model_validator(mode="after")
    def _is_something(self) -> Region:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("steps and seconds exclude each other")
        for name in ("steps", "seconds", "rows", "columns"):
            span = getattr(self, name)
            if span is not None and not 0 <= span[0] < span[1]:
                raise ValueError(f"{name} {list(span)} hold nothing: write [first, one after the last]")
        return self


def region_mask(region: Region, grid: Grid, frame_times_s: NDArray[np.float64] | None) -> NDArray[np.bool_] | None:
    """bool [T', S] Tokens inside; None: all of them.

    Args:
        region: What was asked for.
        grid: Of the backbone.
        frame_times_s: [T] When each frame of the clip is shown; T a multiple of T'. None: unknown.

    Raises:
        TubeletError: it reaches past the grid, holds no token, the mask has another shape, or times are unknown.
    """
    if region == Region():
        return None
    inside = np.ones((grid.time, grid.height, grid.width), dtype=bool)
    for axis, (name, size) in enumerate((("steps", grid.time), ("rows", grid.height), ("columns", grid.width))):
        span = getattr(region, name)
        if span is None:
            continue
        if span[1] > size:
            raise TubeletError(
                f"{name} {list(span)} reach past the grid, which has {size}", f"Give {name} within [0, {size}]"
            )
        keep = np.zeros(size, dtype=bool)
        keep[span[0] : span[1]] = True
        inside &= np.expand_dims(keep, [other for other in range(3) if other != axis])
    if region.seconds is not None:
        inside &= _steps_within(region.seconds, grid.time, frame_times_s)[:, None, None]
    if region.mask is not None:
        inside &= _read_mask(region.mask, inside.shape)
    if not inside.any():
        raise TubeletError("The region holds no token", "Widen it")
    return inside.reshape(grid.time, grid.space)


def _steps_within(
    seconds: tuple[float, float], steps: int, frame_times_s: NDArray[np.float64] | None
) -> NDArray[np.bool_]:
    if frame_times_s is None or np.isnan(frame_times_s).any():
        raise TubeletError("The video does not say when its frames are shown", "Give steps instead of seconds")
    times_TK = frame_times_s.reshape(steps, -1)
    within = np.any((times_TK >= seconds[0]) & (times_TK < seconds[1]), axis=1)
    if not within.any():
        raise TubeletError(
            f"No frame of the clip is shown from {seconds[0]:g} s to {seconds[1]:g} s; its frames lie between "
            f"{frame_times_s.min():.2f} s and {frame_times_s.max():.2f} s",
            "Give seconds within these",
        )
    return np.asarray(within, dtype=np.bool_)


def _read_mask(path: Path, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TubeletError(f"Mask {path} cannot be read: {error}", "Give a .npy file of bool") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape not in (shape, shape[1:]):
        raise TubeletError(
            f"Mask {path} is not an array of bool {list(shape[1:])} or {list(shape)}",
            "Make it with the grid of the backbone: [steps, rows, columns] of patches",
        )
    return np.broadcast_to(mask, shape)
