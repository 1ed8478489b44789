"""Pairs of neighboring tokens, found by index arithmetic inside a window.

    anchor (clip v, time t, patch p) ──▶ temporal: (v, t + delta, p)        delta in 1 ... max_delta
                                     └─▶ spatial:  (v, t, p')               p' a neighbor of p in the same frame

All time steps of a patch are in one window, and whole frames are where blocks are whole grids, so a pair costs the
gather of one more row. The pair of an anchor is a hash of (seed, step, place in the batch): a pure function, evaluated
on the device, the same for any number of ranks.

A clip shorter than the frames sampled repeats the last one. A latent step that covers a repeated frame equals its
neighbor for any encoder, so it is in no pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_store.plan import Grid
from tubelet_store.reader import Store
from tubelet_trainer.config import PairsConfig
from tubelet_trainer.data.batch import Pairs
from tubelet_trainer.data.prefetcher import Window

# Constants of the splitmix64 finalizer (Stafford's mix 13) as signed 64-bit integers: torch has no unsigned products.
_MIX_A = 0xBF58476D1CE4E5B9 - 2**64
_MIX_B = 0x94D049BB133111EB - 2**64

_STEPS_4 = ((-1, 0), (0, -1), (0, 1), (1, 0))
_STEPS_8 = (*_STEPS_4, (-1, -1), (-1, 1), (1, -1), (1, 1))


@dataclass(frozen=True)
class PairDraw:
    """Which pairs a loader draws."""

    config: PairsConfig
    temporal: bool
    spatial: bool


class PairArithmetic:
    """Neighbors of tokens in a window, on the device.

    Args:
        draw: Which pairs.
        store: For the grid and the repeated frames.
        block_patches: Patches per block of the window.
        seed: Seed of the pairs.
        device: Where the windows are.

    Raises:
        TubeletError: the grid has no such neighbors, or blocks do not hold whole frames and spatial pairs are wanted.
    """

    def __init__(self, draw: PairDraw, store: Store, block_patches: int, seed: int, device: torch.device) -> None:
        grid = store.plan.grid
        self._grid, self._block_patches, self._seed = grid, block_patches, seed
        self._max_delta = draw.config.max_delta
        if draw.temporal and self._max_delta >= grid.time:
            raise TubeletError(
                f"pairs.max_delta {self._max_delta} does not fit the {grid.time} latent steps of {store.url}",
                f"Choose at most {grid.time - 1}" if grid.time > 1 else "Set objective.lambda_t and lambda_smooth to 0",
            )
        if draw.spatial and block_patches != grid.space:
            raise TubeletError(
                f"Spatial pairs need whole frames in a window, but block_patches is {block_patches} of {grid.space}",
                f"Leave block_patches out, or set it to {grid.space}",
            )
        self._fresh_CT = torch.from_numpy(fresh_steps(store)).to(device)
        if draw.spatial:
            kept, kind = store.kept_patches, draw.config.neighbors
            # Of a store that keeps some patches of each clip, rows next to each other need not be neighbors.
            scattered = kept is not None and kind != "random" and grid.space > 1
            self._kept_CS = torch.from_numpy(kept).to(device) if kept is not None and scattered else None
            table, counts = neighbor_table(store.plan.position_grid if scattered else grid, kind)
            self._neighbors_PM = torch.from_numpy(table).to(device)
            self._counts_P = torch.from_numpy(counts).to(device)

    def temporal(self, rows: Tensor, clips: Tensor, step: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Window rows [A] of the neighbors in time, and which are valid [A]; invalid anchors get their own row.

        Args:
            rows: [A] Window rows of the anchors.
            clips: [A] Their clips in the store.
            step: Number of the batch.
            places: [A] Their places in the whole batch.
        """
        time = rows // self._block_patches % self._grid.time
        delta = 1 + _draws(places, ("temporal", self._seed, step)) % self._max_delta
        exists = time + delta < self._grid.time
        delta = torch.where(exists, delta, 0)
        valid = exists & self._fresh_CT[clips, time] & self._fresh_CT[clips, time + delta]
        return rows + delta * self._block_patches, valid

    def spatial(self, rows: Tensor, clips: Tensor, step: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Window rows [A] of neighbors in the same frame, and which are valid [A]; arguments as in `temporal`."""
        patch = rows % self._block_patches
        time = rows // self._block_patches % self._grid.time
        draws, fresh = _draws(places, ("spatial", self._seed, step)), self._fresh_CT[clips, time]
        if self._kept_CS is not None:
            other, exists = self._kept_neighbor(self._kept_CS[clips], patch, draws)
            return rows - patch + other, fresh & exists
        return rows - patch + self._neighbors_PM[patch, draws % self._counts_P[patch]], fresh

    def _kept_neighbor(self, kept_AS: Tensor, patch: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Of each anchor one of those neighbors that its clip keeps, and whether it keeps any; else itself."""
        place = kept_AS.gather(1, patch[:, None])[:, 0].long()
        wanted_AM = self._neighbors_PM[place]
        counted_AM = torch.arange(wanted_AM.shape[1], device=patch.device) < self._counts_P[place][:, None]
        found_AMS = (kept_AS[:, None, :] == wanted_AM[:, :, None]) & counted_AM[:, :, None]
        there_AM = found_AMS.any(2)
        count = there_AM.sum(1)
        drawn_AM = there_AM & (there_AM.cumsum(1) == 1 + (draws % count.clamp(min=1))[:, None])
        other = (found_AMS & drawn_AM[:, :, None]).any(1).int().argmax(1)
        return torch.where(count > 0, other, patch), count > 0


def neighbor_table(grid: Grid, kind: Literal[4, 8, "random"]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Neighbors of each patch.

    Returns:
        [space, most] patches, row-major, padded with 0, and [space] how many of them count.

    Raises:
        TubeletError: a patch has no neighbor.
    """
    if grid.space == 1:
        raise TubeletError("The grid has a single patch: no spatial pairs", "Set objective.lambda_s to 0")
    everything = range(grid.space)
    if kind == "random":
        rows = [[other for other in everything if other != patch] for patch in everything]
    else:
        rows = [
            [
                (y + dy) * grid.width + x + dx
                for dy, dx in (_STEPS_4 if kind == 4 else _STEPS_8)
                if 0 <= y + dy < grid.height and 0 <= x + dx < grid.width
            ]
            for y, x in (divmod(patch, grid.width) for patch in everything)
        ]
    table = np.zeros((grid.space, max(map(len, rows))), dtype=np.int64)
    for patch, row in enumerate(rows):
        table[patch, : len(row)] = row
    return table, np.array([len(row) for row in rows], dtype=np.int64)


def fresh_steps(store: Store) -> NDArray[np.bool_]:
    """bool [clips, steps]: latent steps that cover no repeated frame.

    A frame repeats if its index equals its predecessor's, or if it is one of the `padded_frames` last of a clip that
    was not sampled uniformly (there the first of those is at the wrong distance even where it is new).
    """
    steps = store.plan.grid.time
    table = store.clips()
    trailing = store.plan.sampling.get("kind") != "uniform"
    fresh = np.ones((store.plan.clips, steps), dtype=bool)
    columns = (table[name].to_pylist() for name in ("clip", "frame_indices", "padded_frames"))
    for clip, indices, padded in zip(*columns, strict=True):
        if not indices:
            continue
        if len(indices) % steps:
            raise TubeletError(
                f"{store.url}: clip {clip} has {len(indices)} frames, which do not divide into {steps} latent steps",
                "Extract the store again: its clip table does not fit its grid",
            )
        fresh[clip] = ~repeated_frames(indices, padded if trailing else None).reshape(steps, -1).any(axis=1)
    return fresh


def repeated_frames(indices: Sequence[int], trailing: int | None) -> NDArray[np.bool_]:
    """bool [frames]: frames whose index equals their predecessor's, and the `trailing` last."""
    repeated = np.concatenate([[False], np.diff(indices) == 0])
    if trailing:
        repeated[len(indices) - trailing :] = True
    return repeated


def _draws(places: Tensor, key: tuple[str | int, ...]) -> Tensor:
    """int64 in [0, 2^31), a hash of `key` and each of `places`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    values = (places + 1) * _MIX_A ^ int.from_bytes(digest, "little", signed=True)
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        values = (values ^ _shifted(values, shift)) * factor
    return _shifted(values ^ _shifted(values, 31), 33)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Part:
    """This rank's part of one batch."""

    rank: int
    ranks: int
    step: int
    """Number of the batch."""
    offset: int
    """Rows of the batch that other streams fill before this one."""
    anchors: int
    """Rows of this stream, over all ranks, that get a pair."""
    most: int
    """Maximum number of anchors of a rank in any batch."""
    short: bool
    """It is the last batch of the run."""


@dataclass
class _Collected:
    positions: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)
    tokens: list[tuple[Tensor, ...]] = field(default_factory=list)


class DrawnPairs:
    """Accumulates the pairs of one batch while its windows are resident. The first rows of a batch are its anchors.

    Args:
        draw: Which pairs.
        arithmetic: Finds the neighbors.
        part: This rank's part of the batch.
    """

    def __init__(self, draw: PairDraw, arithmetic: PairArithmetic, part: Part) -> None:
        self._arithmetic, self._part = arithmetic, part
        self._seen = 0
        self._clips: set[int] = set()
        self._rows: list[Tensor] = []
        self._temporal = _Collected() if draw.temporal else None
        self._spatial = _Collected() if draw.spatial else None

    def add(self, window: Window, rows: Tensor, host_rows: NDArray[np.int64], filled: int) -> None:
        """Draw for the anchors among the next `rows` of the whole batch; this rank's begin at `filled` of its part."""
        part, where = self._part, window.locations
        taken = min(len(rows), part.anchors - self._seen)
        if taken <= 0:
            return
        clips = where.clips_on_host(host_rows[:taken])
        self._clips |= {int(clips.min()), int(clips.max())}
        first = (part.rank - part.offset - self._seen) % part.ranks
        own = rows[first : taken : part.ranks]
        self._rows.append(torch.arange(filled, filled + len(own), device=rows.device))
        places = part.offset + self._seen + first + part.ranks * torch.arange(len(own), device=rows.device)
        for collected, neighbors_of in (
            (self._temporal, self._arithmetic.temporal),
            (self._spatial, self._arithmetic.spatial),
        ):
            if collected is not None:
                neighbors, valid = neighbors_of(own, where.clips(own), part.step, places)
                collected.positions.append(where.positions(neighbors))
                collected.valid.append(valid)
                collected.tokens.append(tuple(tokens.index_select(0, neighbors).float() for tokens in window.tokens))
        self._seen += taken

    def pairs(self, hooks: Sequence[str]) -> tuple[Pairs | None, Pairs | None]:
        """Temporal and spatial pairs of the batch; `hooks` names what windows hold."""
        return self._of(self._temporal, hooks), self._of(self._spatial, hooks)

    def _of(self, collected: _Collected | None, hooks: Sequence[str]) -> Pairs | None:
        if collected is None or not collected.positions:
            return None
        tokens = {
            hook: torch.cat(parts) for hook, parts in zip(hooks, zip(*collected.tokens, strict=True), strict=True)
        }
        return Pairs(
            rows=torch.cat(self._rows),
            hooks=tokens,
            positions=torch.cat(collected.positions),
            valid=torch.cat(collected.valid),
            whole=self._part.anchors,
            most=self._part.most,
            several_clips=len(self._clips) > 1 or self._part.short,
        )
