"""Where the rows of a window come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tubelet_store import Grid


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
        inside = rows % self.block_tokens
        first = self.on_device[rows // self.block_tokens]
        return first + inside // self.block_patches * self.grid.space + inside % self.block_patches

    def clips(self, rows: Tensor) -> Tensor:
        """Clips of the tokens at `rows`, as the store counts them."""
        return self.positions(rows) // self.grid.tokens - self.clip_offset

    def clips_on_host(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same plus `clip_offset`, without asking the device."""
        return self.first_position[rows // self.block_tokens] // self.grid.tokens
