"""Pairs of views of one video that show the same content at different places of the token grid.

    in space   still [s:, s:]  and  moved [:-s, :-s]  are the same pixels     (a view s patches further down and right)
    in time    still [s:]      and  moved [:-s]       are the same frames     (a window s tubelets later)

Both are cut to their overlap before encoding: the two overlaps are then encoded in arrays of one shape, so a frame-wise
backbone gives the same codes of the same frames to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from tubelet_lens.inputs.clip_selection import some_of
from tubelet_store.plan import Grid
from tubelet_store.reader import Store
from tubelet_trainer.data.pairs import fresh_steps

Axis = Literal["spatial", "temporal"]


@dataclass(frozen=True)
class ShiftedPair:
    """Clips `still` and `moved` of one video, by number."""

    still: int
    moved: int
    video: str


@dataclass(frozen=True)
class ShiftedPairs:
    """All usable pairs of a store, of one kind of shift.

    Attributes:
        axis: In space or in time.
        shift: By how many patches or latent steps.
        grid: Token grid of the overlap.
        pairs: In the store's order.
        unusable: Pairs of which a view failed, or whose overlap holds other or repeated frames.
    """

    axis: Axis
    shift: int
    grid: Grid
    pairs: tuple[ShiftedPair, ...]
    unusable: int

    @property
    def largest(self) -> float:
        """Largest distance within the overlap: its diagonal in patches, or its length in steps less one."""
        if self.axis == "temporal":
            return float(self.grid.time - 1)
        return float(np.hypot(self.grid.height - 1, self.grid.width - 1))

    def overlap(self, still_TSD: Tensor, moved_TSD: Tensor) -> tuple[Tensor, Tensor]:
        """What both views show, [T', S', D] each, from whole clips [T, S, D]."""
        by = self.shift
        if self.axis == "temporal":
            return still_TSD[by:].contiguous(), moved_TSD[:-by].contiguous()
        shape = (still_TSD.shape[0], self.grid.height + by, self.grid.width + by, still_TSD.shape[2])
        still, moved = still_TSD.reshape(shape)[:, by:, by:], moved_TSD.reshape(shape)[:, :-by, :-by]
        return still.flatten(1, 2), moved.flatten(1, 2)


def shifted_pairs(
    store: Store, axis: Axis, videos: Sequence[str] | None = None, limit: int | None = None
) -> ShiftedPairs | None:
    """The pairs of `store` that are shifted along `axis`; None if it has no such views, or they overlap in one place.

    Args:
        store: Of whole token grids.
        axis: In space or in time.
        videos: Only pairs of these.
        limit: Most pairs, drawn at random.
    """
    wanted = None if videos is None else set(videos)
    moved_column = "shift_patches" if axis == "spatial" else "shift_tubelets"
    columns = ("clip", "video_id", "temporal_view", "shift_patches", "shift_tubelets", "frame_indices")
    table = store.clips()
    rows = [
        dict(zip(columns, row, strict=True)) for row in zip(*(table[name].to_pylist() for name in columns), strict=True)
    ]
    rows = [row for row in rows if row["shift_patches"] is not None and (wanted is None or row["video_id"] in wanted)]
    still = {
        (row["video_id"], row["temporal_view"]): row
        for row in rows
        if row["shift_patches"] == 0 and row["shift_tubelets"] == 0
    }
    moved = [row for row in rows if row[moved_column]]
    if not moved:
        return None
    shift = int(moved[0][moved_column])
    whole = store.plan.grid
    if axis == "spatial":
        grid = Grid(time=whole.time, height=whole.height - shift, width=whole.width - shift)
    else:
        grid = Grid(time=whole.time - shift, height=whole.height, width=whole.width)
    ok, fresh_CT = store.ok(), fresh_steps(store)
    pairs = []
    for row in moved:
        first = still.get((row["video_id"], row["temporal_view"]))
        if first is None or not (ok[first["clip"]] and ok[row["clip"]]):
            continue
        if axis == "temporal":
            frames = len(row["frame_indices"]) // whole.time * shift
            fresh = fresh_CT[first["clip"]][shift:].all() and fresh_CT[row["clip"]][:-shift].all()
            if first["frame_indices"][frames:] != row["frame_indices"][:-frames] or not fresh:
                continue
        elif first["frame_indices"] != row["frame_indices"]:
            continue
        pairs.append(ShiftedPair(first["clip"], row["clip"], row["video_id"]))
    unusable = len(moved) - len(pairs)
    pairs = [pairs[place] for place in some_of(np.arange(len(pairs)), limit)]
    shifted = ShiftedPairs(axis, shift, grid, tuple(pairs), unusable)
    return shifted if shifted.largest > 0 else None
