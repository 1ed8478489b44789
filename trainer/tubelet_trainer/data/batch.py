"""What the loader hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tubelet_store.plan import Grid
from tubelet_trainer.data.pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """Tokens and where each comes from."""

    hooks: Mapping[str, Tensor]
    """Per hook [B, D], as stored (not normalized); float32 unless another type was asked for."""
    positions: Tensor
    """[B] int64: (clip x time steps + time) x patches + patch; distance in space and time is arithmetic."""
    grid: Grid
    whole: int
    """Tokens of the batch over all ranks: fewer than usual in the last batch of a run, which may be a single token."""
    temporal: Pairs | None = None
    """Neighbors in time of some of the tokens, where they are drawn."""
    spatial: Pairs | None = None
    """Neighbors in the same frame."""

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
