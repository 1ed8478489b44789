"""What an edit does to a latent's activation f, and in which part of the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.plan import Grid


class Suppress(Config):
    """f' = -strength x the latent's largest observed activation, on every token."""

    kind: Literal["suppress"] = "suppress"
    strength: float = Field(default=0.0, ge=0)
    """0: the latent is switched off (f' = 0). 2: as in the demonstrations of saev (Stevens et al., s = -2)."""


class Amplify(Config):
    """f' = factor x f. Changes only tokens on which the latent is active."""

    kind: Literal["amplify"] = "amplify"
    factor: float = 4.0
    """1: no change. 0: switched off."""


class SetTo(Config):
    """f' = value, on every token."""

    kind: Literal["set"] = "set"
    value: float
    """In units of the code."""


Operation = Annotated[Suppress | Amplify | SetTo, Field(discriminator="kind")]


class Region(Config):
    """Part of a clip. Ranges that are not set cover everything."""

    steps: tuple[int, int] | None = None
    """First latent step, and the one after the last."""
    seconds: tuple[float, float] | None = None
    """Time range in the video, instead of steps: every step with a frame shown at or after the first time and before
    the second."""
    rows: tuple[int, int] | None = None
    """First row of patches, and the one after the last."""
    columns: tuple[int, int] | None = None
    """First column of patches, and the one after the last."""
    mask: Path | None = None
    """Boolean array (.npy) of patches, [rows, columns] or [steps, rows, columns]; intersected with the ranges."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Region:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("give steps or seconds, not both")
        for name in ("steps", "seconds", "rows", "columns"):
            span = getattr(self, name)
            if span is not None and not 0 <= span[0] < span[1]:
                raise ValueError(f"{name} {list(span)} is empty: write [first, one after the last]")
        return self


def region_mask(region: Region, grid: Grid, frame_times_s: NDArray[np.float64] | None) -> NDArray[np.bool_] | None:
    """bool [T', S] Tokens inside; None: all of them.

    Args:
        region: The part of the clip.
        grid: Of the backbone.
        frame_times_s: [T] When each frame of the clip is shown; T a multiple of T'. None: unknown.

    Raises:
        TubeletError: the region exceeds the grid or contains no token, the mask has another shape, or frame times are
            unknown.
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
                f"{name} {list(span)} exceeds the grid, which has {size}", f"Use {name} within [0, {size}]"
            )
        keep = np.zeros(size, dtype=bool)
        keep[span[0] : span[1]] = True
        inside &= np.expand_dims(keep, [other for other in range(3) if other != axis])
    if region.seconds is not None:
        inside &= _steps_within(region.seconds, grid.time, frame_times_s)[:, None, None]
    if region.mask is not None:
        inside &= _read_mask(region.mask, inside.shape)
    if not inside.any():
        raise TubeletError("The region contains no token", "Use a larger region")
    return inside.reshape(grid.time, grid.space)


def _steps_within(
    seconds: tuple[float, float], steps: int, frame_times_s: NDArray[np.float64] | None
) -> NDArray[np.bool_]:
    if frame_times_s is None or np.isnan(frame_times_s).any():
        raise TubeletError("The video has no frame times", "Give steps instead of seconds")
    times_TK = frame_times_s.reshape(steps, -1)
    within = np.any((times_TK >= seconds[0]) & (times_TK < seconds[1]), axis=1)
    if not within.any():
        raise TubeletError(
            f"No frame of the clip is shown from {seconds[0]:g} s to {seconds[1]:g} s; its frames are between "
            f"{frame_times_s.min():.2f} s and {frame_times_s.max():.2f} s",
            "Use seconds within this range",
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
            "Use the backbone's grid: [steps, rows, columns] of patches",
        )
    return np.broadcast_to(mask, shape)
