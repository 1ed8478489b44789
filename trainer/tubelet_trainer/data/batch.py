"""A batch: tokens, their positions, and the neighbors that objectives compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet_store.plan import Grid


@dataclass(frozen=True)
class Pairs:
    """A anchors of a batch, each with a neighbor."""

    rows: Tensor
    """[A] int64: rows of the batch that are anchors."""
    hooks: Mapping[str, Tensor]
    """Per hook the neighbor's tokens [A, D], float32 as stored."""
    positions: Tensor
    """[A] int64: the neighbors' positions (see `Batch.positions`)."""
    valid: Tensor
    """[A] bool: the anchor has a neighbor, and neither is a repeated frame."""
    whole: int
    """Anchors of the batch over all ranks."""
    most: int
    """Maximum number of anchors of a rank in this batch."""
    several_clips: bool
    """The anchors of the whole batch, over all ranks, come from more than one clip. Needs no synchronization.
    Also true of the short batch that ends a run: it may be a single token, whose contrast is 0."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """Tokens and their positions."""

    hooks: Mapping[str, Tensor]
    """Per hook [B, D], as stored (not normalized); float32 unless the loader has another dtype."""
    positions: Tensor
    """[B] int64: (clip x time steps + time) x patches + patch; distance in space and time is arithmetic."""
    grid: Grid
    whole: int
    """Tokens of the batch over all ranks: fewer than usual in the last batch of a run, which may be a single token."""
    temporal: Pairs | None = None
    """Neighbors in time of the anchors; None: not drawn."""
    spatial: Pairs | None = None
    """Neighbors in the same frame; None: not drawn."""

    @property
    def tokens(self) -> Tensor:
        """[B, D] Tokens at the first (or only) hook."""
        return next(iter(self.hooks.values()))

    @property
    def clip(self) -> Tensor:
        """[B] Clip of each token: its row in the store's clip table (in a mixture, counted through all stores)."""
        return self.positions // self.grid.tokens

    @property
    def time(self) -> Tensor:
        """[B] Time step of each token."""
        return self.positions % self.grid.tokens // self.grid.space

    @property
    def patch(self) -> Tensor:
        """[B] Patch of each token: its place on axis `space`, row-major over the grid (see `Store.patch_positions`)."""
        return self.positions % self.grid.space

    def __len__(self) -> int:
        return len(self.positions)


def join_pairs(parts: Sequence[Pairs], starts: Sequence[int]) -> Pairs:
    """Pairs of a batch that is the concatenation of batches; batch i begins at row `starts[i]`."""
    return Pairs(
        rows=torch.cat([part.rows + start for part, start in zip(parts, starts, strict=True)]),
        hooks={hook: torch.cat([part.hooks[hook] for part in parts]) for hook in parts[0].hooks},
        positions=torch.cat([part.positions for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
        whole=sum(part.whole for part in parts),
        most=sum(part.most for part in parts),
        several_clips=any(part.several_clips for part in parts) or sum(len(part) > 0 for part in parts) > 1,
    )
