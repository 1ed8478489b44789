"""The order of tokens: a pure function of a key, evaluated at any position in constant memory.

    position ──▶ (left, right) on an a x b grid ──▶ keyed rounds ──▶ cycle walk until < n ──▶ id

A Feistel network over a grid of mixed radix (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", method 3)
is a bijection for any a and b. With a = ceil(sqrt(n)) and b = ceil(n / a) the grid holds fewer than n + a points, so
walking on from the few points outside [0, n) is rare. Integers only: the order is the same on every
machine and device, and position i costs the same for any i.

The blocks of an epoch are shuffled all together, or, where not all shards fit on local disk, in groups of shards that
are drawn at random (`EpochOrder`). Blocks are read in windows, whose tokens are shuffled together (`WindowOrder`):

    stream position ─▶ (epoch, window) ─▶ blocks, in the order of the file ─▶ rows, as they are served

The tokens of all epochs form one endless stream; a position is a place in it. This is arithmetic: nothing is read.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_trainer.data.source import Source

# Bumped when the same key would give another order; part of what a checkpoint remembers.
ORDER_VERSION = 2

# Four rounds make a Feistel network a strong pseudo-random permutation (Luby & Rackoff 1988); two more are margin. On a
# grid of few points, whose halves take two or three values, six leave some orders likelier than others.
_ROUNDS = 6
_SMALL, _ROUNDS_OF_SMALL = 256, 16

# Positions worked on together: their intermediate values stay in the cache.
_TOGETHER = 1 << 13

# Below it numbers of 32 bits will do, whose products processors have instructions for: 262,144 positions in 6.4 ms
# instead of 20.4, which is a fifth instead of two thirds of the time in which their tokens are copied.
_NARROW_BELOW = 2**31

Words = NDArray[np.unsignedinteger[Any]]


class Permutation:
    """A permutation of range(`size`) chosen by `key`.

    Args:
        size: Length n of the permutation, below 2^62.
        key: Identifies the permutation, e.g. `("blocks", seed, epoch)`. Only its text form counts.
    """

    def __init__(self, size: int, key: tuple[str | int, ...]) -> None:
        if not 0 < size < 2**62:
            raise ValueError(f"size {size} is not in [1, 2^62)")
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        self._word: type[np.uint32 | np.uint64] = np.uint32 if size < _NARROW_BELOW else np.uint64
        self._mix = _mix32 if size < _NARROW_BELOW else _mix64
        rounds = _ROUNDS if size >= _SMALL else _ROUNDS_OF_SMALL
        digest = hashlib.blake2b(repr(key).encode(), digest_size=rounds * np.dtype(self._word).itemsize).digest()
        self._keys = np.frombuffer(digest, dtype=np.dtype(self._word).newbyteorder("<")).astype(self._word)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids at `positions` [N] (each in [0, size)), int64 [N]."""
        ids_N = np.empty(len(positions), dtype=np.int64)
        for start in range(0, len(positions), _TOGETHER):
            ids = self._rounds(positions[start : start + _TOGETHER].astype(self._word))
            outside = np.flatnonzero(ids >= self.size)
            while len(outside):
                ids[outside] = self._rounds(ids[outside])
                outside = outside[ids[outside] >= self.size]
            ids_N[start : start + _TOGETHER] = ids
        return ids_N

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids at positions [start, stop)."""
        return self(np.arange(start, stop, dtype=np.int64))

    def _rounds(self, points: Words) -> Words:
        a, b = self._word(self._left), self._word(self._right)
        left = points // b
        right = points - left * b
        for number, key in enumerate(self._keys):
            if number % 2:
                right = _modulo(_modulo(self._mix(left ^ key), b) + right, b)
            else:
                left = _modulo(_modulo(self._mix(right ^ key), a) + left, a)
        return left * b + right


class EpochOrder:
    """The order of one epoch's blocks, and of their shards.

        shards ──permutation──▶ groups of `together` shards ──▶ the blocks of each group, shuffled

    Args:
        first_block: [shards + 1] First block of each shard, ascending from 0, and the number of all blocks.
        together: Shards whose blocks are shuffled together; None: all.
        key: Names the epoch, e.g. `(seed, epoch)`.
    """

    def __init__(self, first_block: NDArray[np.int64], together: int | None, key: tuple[int, ...]) -> None:
        self._first_block = first_block
        self._key = key
        shards = len(first_block) - 1
        # Groups differ by at most one shard: a small last one would mix few clips.
        groups = 1 if together is None else -(-shards // together)
        self._first_shard = np.arange(groups + 1, dtype=np.int64) * shards // groups
        drawn = np.arange(shards, dtype=np.int64)
        if groups > 1:
            drawn = Permutation(shards, ("shards", *key)).slice(0, shards)
        self._drawn = drawn
        """[shards] Shards in the order of their groups."""
        self._blocks = np.concatenate([[0], np.cumsum(np.diff(first_block)[drawn])]).astype(np.int64)
        """[shards + 1] Position at which each drawn shard's blocks would begin if they were not shuffled."""

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Blocks at positions [start, stop) of the epoch."""
        blocks = []
        bounds = self._blocks[self._first_shard]
        for group in range(self.group(start), len(self._first_shard) - 1):
            first, last = int(bounds[group]), int(bounds[group + 1])
            if first >= stop:
                break
            name: tuple[str | int, ...] = ("blocks", *self._key, *([group] if len(bounds) > 2 else []))
            places = first + Permutation(last - first, name).slice(max(start, first) - first, min(stop, last) - first)
            drawn = np.searchsorted(self._blocks, places, side="right") - 1
            blocks.append(self._first_block[self._drawn[drawn]] + places - self._blocks[drawn])
        return np.concatenate(blocks)

    def group(self, position: int) -> int:
        """Group that holds the block at `position`."""
        return int(np.searchsorted(self._blocks[self._first_shard], position, side="right")) - 1

    def groups_from(self, group: int) -> list[NDArray[np.int64]]:
        """Shards (their numbers in `first_block`) of `group` and of each that follows, in reading order."""
        return np.split(
            self._drawn[self._first_shard[group] :], self._first_shard[group + 1 : -1] - self._first_shard[group]
        )


def _mix64(values: Words) -> Words:
    """The finalizer of splitmix64 (Stafford's mix 13)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix32(values: Words) -> Words:
    """The finalizer lowbias32 (Wellons 2018, "Prospecting for hash functions")."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x7FEB352D)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(0x846CA68B)
    return values ^ (values >> np.uint32(16))


def _modulo(values: Words, divisor: np.unsignedinteger[Any]) -> Words:
    """`values % divisor`; NumPy has fast division by a constant, but no fast remainder."""
    return values - values // divisor * divisor


@dataclass(frozen=True)
class WindowBlocks:
    """The blocks of one window, in the order of the file."""

    clips: NDArray[np.int64]
    """[K] Clip of each block, ascending."""
    groups: NDArray[np.int64]
    """[K] Its group of patches."""
    numbers: NDArray[np.int64]
    """[K] Its number among all blocks of the stream."""


class WindowOrder:
    """The order of a stream over `clips`.

    Args:
        source: Source of the tokens.
        clips: [N] Clips to serve, ascending.
        window_tokens: Maximum tokens of a window.
        resident_shards: Shards whose blocks are shuffled together; None: all.
        seed: Seed of the order.
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
        """Maximum number of shards whose blocks are shuffled together."""
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
        """Blocks of a window, ascending: files are read in order, tokens are shuffled afterwards."""
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
        """Shards of `group` and of each group that follows in the epoch, in reading order."""
        return [self._shards[shards] for shards in self._order(epoch).groups_from(group)]

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._first_block, self.resident_shards, (self._seed, epoch))

    def _first_block_of(self, window: int) -> int:
        return window * self.blocks // self.windows
