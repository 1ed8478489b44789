"""Which blocks lie in which window, and in which order their tokens are served: arithmetic only, nothing is read.

    stream position ─▶ (epoch, window) ─▶ blocks, as they lie in the window ─▶ rows, as they are served

The tokens of all epochs form one endless stream; a position is a place in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_trainer.data.order import EpochOrder, Permutation
from tubelet_trainer.data.source import Source


@dataclass(frozen=True)
class WindowBlocks:
    """The blocks of one window, as they lie in it."""

    clips: NDArray[np.int64]
    """[K] Clip of each block, ascending."""
    groups: NDArray[np.int64]
    """[K] Its group of patches."""
    numbers: NDArray[np.int64]
    """[K] Its number among all blocks of the stream."""


class WindowOrder:
    """The order of a stream over `clips`.

    Args:
        source: Where the tokens lie.
        clips: [N] Clips to serve, ascending.
        window_tokens: Most tokens of a window.
        resident_shards: Shards whose blocks are shuffled together; None: all.
        seed: Chooses the order.
    """

    def __init__(
        self, source: Source, clips: NDArray[np.int64], window_tokens: int, resident_shards: int | None, seed: int
    ) -> None:
        self._clips, self._groups, self._seed = clips, source.groups, seed
        self._block_tokens = source.block_tokens
        self.blocks = len(clips) * source.groups
        """Blocks of an epoch."""
        self.tokens = self.blocks * source.block_tokens
        """Tokens of an epoch."""
        self._shards, first_clip = np.unique(clips // source.store.plan.clips_per_shard, return_index=True)
        self._first_block = np.append(first_clip, len(clips)) * source.groups
        shards = len(self._shards)
        self.resident_shards = None if resident_shards is None or resident_shards >= shards else resident_shards
        self.together = self.resident_shards or shards
        """Most shards whose blocks are shuffled together."""
        # Windows of one epoch differ by at most one block: a small last window would mix few clips.
        self.windows = -(-self.blocks // max(1, window_tokens // source.block_tokens))
        self.window_tokens = -(-self.blocks // self.windows) * source.block_tokens
        """Tokens of the largest window."""

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch and window that hold stream position `position`."""
        epoch, offset = divmod(position, self.tokens)
        block = offset // self._block_tokens
        # The last w with w * blocks // windows <= block.
        return epoch, ((block + 1) * self.windows - 1) // self.blocks

    def start(self, epoch: int, window: int) -> int:
        """Stream position at which a window begins; `window` may be the number of windows: where the epoch ends."""
        return epoch * self.tokens + self._first_block_of(window) * self._block_tokens

    def window(self, epoch: int, window: int) -> WindowBlocks:
        """Blocks of a window, ascending: pages are touched in the order of the file, tokens are shuffled afterwards."""
        blocks = np.sort(self._order(epoch).slice(self._first_block_of(window), self._first_block_of(window + 1)))
        chosen, groups = np.divmod(blocks, self._groups)
        return WindowBlocks(self._clips[chosen], groups, blocks)

    def rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """[tokens] Rows of a window in the order they are served."""
        tokens = self.start(epoch, window + 1) - self.start(epoch, window)
        return Permutation(tokens, ("tokens", self._seed, epoch, window)).slice(0, tokens)

    def group(self, epoch: int, window: int) -> int:
        """Group of shards in which a window begins."""
        return self._order(epoch).group(self._first_block_of(window))

    def groups_from(self, epoch: int, group: int) -> list[NDArray[np.int64]]:
        """Shards of `group` and of each group that follows in the epoch, in the order of their need."""
        return [self._shards[shards] for shards in self._order(epoch).groups_from(group)]

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._first_block, self.resident_shards, (self._seed, epoch))

    def _first_block_of(self, window: int) -> int:
        return window * self.blocks // self.windows
