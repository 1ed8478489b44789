"""Which of the backbone's tokens are stored: all, some patches of each clip, or averages over boxes.

A patch is kept at every time step: losses and metrics use pairs of neighboring tokens, which a random choice of single
tokens would destroy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.plan import Grid, TokenSelection


class AllTokens(Config):
    """Every token."""

    kind: Literal["all"] = "all"


class PatchSubset(Config):
    """Some patches of each clip, at all time steps; different patches in each clip."""

    kind: Literal["patches"] = "patches"
    keep: int = Field(ge=1)
    """Patches kept per clip."""
    seed: int = 0
    """Seed of the choice."""


class PooledGrid(Config):
    """Averages over boxes of tokens, all of one size."""

    kind: Literal["pooled"] = "pooled"
    height: int = Field(ge=1)
    """Rows after pooling; divides those of the backbone."""
    width: int = Field(ge=1)
    """Columns after pooling; divides those of the backbone."""
    time: int | None = Field(default=None, ge=1)
    """Time steps after pooling; divides those of the backbone. None: all."""


Tokens = Annotated[AllTokens | PatchSubset | PooledGrid, Field(discriminator="kind")]


class TokenSelector:
    """Applies `config` to tokens of a backbone's `grid`.

    Raises:
        TubeletError: the grid has fewer patches, or does not divide into such boxes.
    """

    def __init__(self, config: AllTokens | PatchSubset | PooledGrid, grid: Grid) -> None:
        self.backbone_grid = grid
        self.grid = grid
        """Grid of the tokens that are stored."""
        self.selection: TokenSelection | None = None
        """As recorded in a plan; None: all tokens are stored."""
        if isinstance(config, PatchSubset):
            if config.keep > grid.space:
                raise TubeletError(
                    f"A clip cannot keep {config.keep} patches: the backbone has {grid.height} x {grid.width}",
                    f"Set tokens.keep to at most {grid.space}",
                )
            self.grid = Grid(time=grid.time, height=1, width=config.keep)
            seed = config.seed
            self.selection = TokenSelection(kind="patches", grid=grid, seed=seed) if config.keep < grid.space else None
        elif isinstance(config, PooledGrid):
            self.grid = Grid(time=config.time or grid.time, height=config.height, width=config.width)
            for axis in ("time", "height", "width"):
                whole, left = getattr(grid, axis), getattr(self.grid, axis)
                if whole % left:
                    divisors = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
                    raise TubeletError(
                        f"{whole} tokens along {axis} cannot be divided into {left} boxes of equal size",
                        f"Set tokens.{axis} to one of {divisors}",
                    )
            self.selection = TokenSelection(kind="pooled", grid=grid)
        if self.selection is None or self.grid == grid:
            self.grid, self.selection = grid, None

    def patches(self, video_id: str, view: int) -> tuple[int, ...] | None:
        """Patches kept of a clip, ascending; None where no patch is left out.

        Those with the smallest BLAKE2b digests of seed, video, view and patch: the same on every machine.
        """
        if self.selection is None or self.selection.kind != "patches":
            return None
        key = f"{self.selection.seed}\n{video_id}\n{view}\n"

        def rank(patch: int) -> bytes:
            return hashlib.blake2b(f"{key}{patch}".encode(), digest_size=16).digest()

        return tuple(sorted(sorted(range(self.backbone_grid.space), key=rank)[: self.grid.space]))

    def __call__(self, tokens: torch.Tensor, patches: Sequence[tuple[int, ...] | None]) -> torch.Tensor:
        """[B, T, S, D] of `grid`, out of [B, T, S, D] of `backbone_grid`.

        Args:
            tokens: All tokens of a batch.
            patches: `self.patches` of each clip.
        """
        if self.selection is None:
            return tokens
        if self.selection.kind == "patches":
            kept_BS = torch.tensor(patches, device=tokens.device)
            batch, time, _, channels = tokens.shape
            index = kept_BS[:, None, :, None].expand(batch, time, self.grid.space, channels)
            return tokens.gather(2, index)
        whole, left = self.backbone_grid, self.grid
        boxes = tokens.unflatten(2, (left.height, whole.height // left.height, left.width, whole.width // left.width))
        boxes = boxes.unflatten(1, (left.time, whole.time // left.time))  # [B, T, t, H, h, W, w, D]
        # In float32: a mean over many half-precision values would round at each step.
        return boxes.float().mean(dim=(2, 4, 6)).flatten(2, 3)
