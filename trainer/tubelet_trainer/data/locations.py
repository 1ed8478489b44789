"""Where the rows of a window come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_store.plan import Grid


@dataclass(frozen=True)
class Locations:
    """Positions (see `Batch.positions`) of the rows of a window; row (block x time + step) x patches + patch."""

    grid: Grid
    block_patches: int
    clip_offset: int
    """What clip numbers in positions are counted from."""
    first_position: NDArray[np.int64]
    """[blocks] Position of each block's first token."""
    on_device: Tensor
    """The same on the device."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.grid.time * self.block_patches

    def positions(self, rows: Tensor) -> Tensor:
        """Positions of the tokens at `rows`."""
        return self._all.index_select(0, rows)

    @cached_property
    def _all(self) -> Tensor:
        """[rows of the window] Made once: divisions for each batch took half as long as gathering its tokens."""
        inside = torch.arange(self.block_tokens, device=self.on_device.device)
        steps, patches = inside // self.block_patches, inside % self.block_patches
        return (self.on_device[:, None] + (steps * self.grid.space + patches)).flatten()

    def clips(self, rows: Tensor) -> Tensor:
        """Clips of the tokens at `rows`, as the store counts them."""
        return self.positions(rows) // self.grid.tokens - self.clip_offset

    def clips_on_host(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same plus `clip_offset`, without asking the device."""
        return self.first_position[rows // self.block_tokens] // self.grid.tokens
