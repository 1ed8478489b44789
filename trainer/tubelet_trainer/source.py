"""One place of one store, cut into blocks: what the loader copies from.

A *block* is a group of neighbouring patches of one clip through all its time steps. In the file it is `time` runs of
`patches` x channels values, so gathering blocks is copying a few long runs, and the neighbours of a token in space
and time lie at fixed distances from it.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tubelet_store import Store, TubeletError
from tubelet_store.errors import nearest

# Clips with no more tokens than this are one block: batches then still mix many clips.
_WHOLE_CLIP_TOKENS = 256

# Maps kept open per source. A map costs an open file (Python's mmap keeps one), of which a process may have so many.
_OPEN_MAPS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

# Values looked at together when searching for non-finite ones: small enough for the cache. Of 2^14, 2^16, 2^18 the last
# was the fastest (1.1 to 1.4 memory copies of the same bytes).
_SCAN_VALUES = 1 << 18


class Source:
    """Activations of one hook of one store, as blocks.

    Args:
        store: An open store; shards of a remote one are read from its mirror.
        hook: Name of the hook; None: the store's only one.
        block_patches: Patches per block, a divisor of the grid's patches. None: the whole grid for clips of at most 256
            tokens, else one row of the grid.

    Raises:
        TubeletError: no such hook, several hooks and none chosen, or `block_patches` does not divide the grid.
    """

    def __init__(self, store: Store, hook: str | None = None, block_patches: int | None = None) -> None:
        self.store = store
        self.hook = choose_hook(store, hook)
        self.grid = store.plan.grid
        self.channels = store.plan.hook(self.hook).channels
        if block_patches is None:
            block_patches = self.grid.space if self.grid.tokens <= _WHOLE_CLIP_TOKENS else self.grid.width
        if block_patches < 1 or self.grid.space % block_patches:
            divisors = [n for n in range(1, self.grid.space + 1) if self.grid.space % n == 0]
            raise TubeletError(
                f"block_patches {block_patches} does not divide the {self.grid.space} patches of {store.url}",
                f"Choose one of {divisors}",
            )
        self.block_patches = block_patches
        self.groups = self.grid.space // block_patches
        self.block_tokens = self.grid.time * block_patches
        self.bits = np.dtype(np.int16 if store.plan.numpy_dtype.itemsize == 2 else np.int32)
        """Integer type as wide as the stored values. Copies go through it: NumPy and torch share no bfloat16."""
        # Of a mirror's files one: a process that waits for a shard must not hold another that somebody waits for.
        self._most_open = _OPEN_MAPS if store.mirror is None else 1
        self._open: dict[int, NDArray[np.signedinteger]] = {}
        self._opening = threading.Lock()

    def usable(self) -> NDArray[np.bool_]:
        """[clips] Clips that hold activations."""
        return self.store.ok()

    def expect(self, shards: Iterable[int]) -> None:
        """Say which shards will be read next, in that order, so that a mirror can fetch them ahead."""
        self.store.expect(self.hook, shards)

    def copy_blocks(self, clips: NDArray[np.int64], groups: NDArray[np.int64], out: NDArray[np.signedinteger]) -> None:
        """Copy blocks into `out`, in the order given.

        Args:
            clips: [K] Clip of each block, ascending.
            groups: [K] Patch group of each block.
            out: [K, time, block_patches, channels] of dtype `bits`, C-contiguous.
        """
        runs_out = out.reshape(len(clips) * self.grid.time, -1)
        steps = np.arange(self.grid.time)
        shards = clips // self.store.plan.clips_per_shard
        for shard in np.unique(shards):
            first, last = np.searchsorted(shards, [shard, shard + 1])
            clip_in_shard = clips[first:last] - self.store.shard_range(int(shard)).start
            rows = (clip_in_shard[:, None] * self.grid.time + steps) * self.groups + groups[first:last, None]
            destination = runs_out[first * self.grid.time : last * self.grid.time]
            # mode="clip" lets NumPy write straight into `out`; the rows are in range by construction.
            np.take(self._runs(int(shard)), rows.ravel(), axis=0, out=destination, mode="clip")

    def refuse_nonfinite(
        self, clips: NDArray[np.int64], groups: NDArray[np.int64], copied: NDArray[np.signedinteger]
    ) -> None:
        """Raise if `copied` (as filled by `copy_blocks`) holds NaN or an infinity, naming the first one's place.

        Raises:
            TubeletError: a clip that is stored as good holds a non-finite value.
        """
        values = copied.reshape(-1)
        unsigned = values.view(np.dtype(f"u{self.bits.itemsize}"))
        # A value is finite if its exponent bits are not all ones; shifting the sign out makes that one comparison.
        limit = {"float16": 0xF800, "bfloat16": 0xFF00, "float32": 0xFF000000}[self.store.plan.dtype]
        scratch = np.empty(min(_SCAN_VALUES, len(unsigned)), dtype=unsigned.dtype)
        for start in range(0, len(unsigned), _SCAN_VALUES):
            part = unsigned[start : start + _SCAN_VALUES]
            shifted = np.left_shift(part, 1, out=scratch[: len(part)])
            if shifted.max() < limit:
                continue
            token, channel = divmod(start + int(np.argmax(shifted >= limit)), self.channels)
            block, inside = divmod(token, self.block_tokens)
            time, patch = divmod(inside, self.block_patches)
            clip = int(clips[block])
            shard = clip // self.store.plan.clips_per_shard
            raise TubeletError(
                f"{self.store.url}: clip {clip} (shard {shard}, hook {self.hook}) is marked ok but holds a non-finite"
                f" value at time {time}, patch {int(groups[block]) * self.block_patches + patch}, channel {channel}",
                "Run `tubelet verify` on the store; if the file is intact, extract that shard again",
            )

    def _runs(self, shard: int) -> NDArray[np.signedinteger]:
        """Shard as [clip x time x group, block_patches x channels] of dtype `bits`: a view of the memory map."""
        with self._opening:
            if shard not in self._open:
                while len(self._open) >= self._most_open:
                    del self._open[next(iter(self._open))]
                mapped = self.store.shard_map(self.hook, shard)
                self._open[shard] = mapped.view(self.bits).reshape(-1, self.block_patches * self.channels)
            return self._open[shard]


def choose_hook(store: Store, name: str | None) -> str:
    """`name` if the store has it; the store's only hook if `name` is None.

    Raises:
        TubeletError: there is no such hook, or several and none was named.
    """
    names = [hook.name for hook in store.plan.hooks]
    if name is None:
        if len(names) > 1:
            raise TubeletError(f"{store.url} holds {len(names)} hooks", f"Choose one with --hook: {', '.join(names)}")
        return names[0]
    if name not in names:
        raise TubeletError(f"{store.url} has no hook '{name}'", f"{nearest(name, names)} It holds: {', '.join(names)}")
    return name
