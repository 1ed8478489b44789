"""Activations of one hook of one store, in blocks that the loader copies.

A *block* is a group of neighboring patches of one clip through all its time steps. In the file it is `time` runs of
`patches` x channels values, so gathering blocks is copying a few long runs, and the neighbors of a token in space
and time are at fixed distances from it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError, nearest
from tubelet_store.format import shard_bytes
from tubelet_store.object_keys import ACTIVATIONS, shard_key
from tubelet_store.reader import Store

# Clips with no more tokens than this are one block: batches then still mix many clips.
_WHOLE_CLIP_TOKENS = 256

# Maps kept open per source. A map costs an open file (Python's mmap keeps one), whose number per process is limited.
_OPEN_MAPS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

# Values looked at together when searching for non-finite ones: small enough for the cache.
_SCAN_VALUES = 1 << 18

# Bits of the smallest positive and negative infinity, read as signed and unsigned integers: what is not finite is not
# below.
_INFINITY = {"float16": (0x7C00, 0xFC00), "bfloat16": (0x7F80, 0xFF80), "float32": (0x7F800000, 0xFF800000)}

# Ranges of a shard requested first. If all were in the page cache, the others are assumed to be there too.
_PROBES = 8

# Runs at most this far apart are read as one.
_GAP_BYTES = 1 << 16


class Source:
    """Activations of one hook of one store, as blocks.

    Args:
        store: An open store; shards of a remote one are read from its cache.
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
        self._open: dict[int, NDArray[np.signedinteger]] = {}
        self._opening = threading.Lock()

    def usable(self) -> NDArray[np.bool_]:
        """[clips] Clips that hold activations."""
        return self.store.ok()

    @property
    def shard_bytes(self) -> int:
        """Size of the largest shard."""
        return shard_bytes(self.store.plan, ACTIVATIONS, self.store.plan.hook(self.hook), 0)

    def read_ahead(self, clips: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
        """Ask the kernel to read blocks from disk into the page cache, in the background.

        Page faults and reads wait for a few pages at a time, and the blocks of a window are scattered. With a cold page
        cache, copying blocks that were requested before ran 1.5 times (a third of a store's blocks) to 12 times (3 % of
        them) as fast. Where they are cached already, requesting would take as long as copying, so it stops.

        Args:
            clips: [K] Clip of each block, ascending.
            groups: [K] Patch group of each block.
        """
        if self.store.cache is not None:
            return  # what was just fetched is in the page cache
        for shard, _, rows in self._by_shard(clips, groups):
            path = self.store.root.local_path(shard_key(ACTIVATIONS, self.hook, shard))
            # Errors are reported where the shard is mapped.
            with contextlib.suppress(OSError):
                if path is not None:
                    self._advise(path, np.sort(rows.ravel()))

    def _advise(self, path: os.PathLike[str], runs: NDArray[np.int64]) -> None:
        run_bytes = self.block_patches * self.channels * self.bits.itemsize
        breaks = np.flatnonzero(np.diff(runs) * run_bytes > run_bytes + _GAP_BYTES) + 1
        starts = runs[np.append(0, breaks)]
        stops = runs[np.append(breaks, len(runs)) - 1] + 1
        ranges = np.stack([starts, stops - starts], axis=1) * run_bytes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_before = _blocks_read()
            probes = slice(None, None, -(-len(ranges) // _PROBES))
            for start, size_bytes in ranges[probes].tolist():
                os.posix_fadvise(descriptor, start, size_bytes, os.POSIX_FADV_WILLNEED)
            if _blocks_read() > read_before:
                for start, size_bytes in np.delete(ranges, probes, axis=0).tolist():
                    os.posix_fadvise(descriptor, start, size_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def copy_blocks(self, clips: NDArray[np.int64], groups: NDArray[np.int64], out: NDArray[np.signedinteger]) -> None:
        """Copy blocks into `out`, in the order given.

        Args:
            clips: [K] Clip of each block, ascending.
            groups: [K] Patch group of each block.
            out: [K, time, block_patches, channels] of dtype `bits`, C-contiguous.
        """
        runs_out = out.reshape(len(clips) * self.grid.time, -1)
        for shard, blocks, rows in self._by_shard(clips, groups):
            destination = runs_out[blocks.start * self.grid.time : blocks.stop * self.grid.time]
            # mode="clip" lets NumPy write straight into `out`; the rows are in range by construction.
            np.take(self._runs(shard), rows.ravel(), axis=0, out=destination, mode="clip")

    def _by_shard(
        self, clips: NDArray[np.int64], groups: NDArray[np.int64]
    ) -> Iterator[tuple[int, slice, NDArray[np.int64]]]:
        """Per shard, which of the blocks lie in it, and their runs [blocks, time] as `_runs` counts them."""
        shards = clips // self.store.plan.clips_per_shard
        steps = np.arange(self.grid.time)
        for shard in np.unique(shards).tolist():
            first, last = np.searchsorted(shards, [shard, shard + 1]).tolist()
            clip_in_shard = clips[first:last] - self.store.shard_range(shard).start
            rows = (clip_in_shard[:, None] * self.grid.time + steps) * self.groups + groups[first:last, None]
            yield shard, slice(first, last), rows

    def refuse_nonfinite(
        self, clips: NDArray[np.int64], groups: NDArray[np.int64], copied: NDArray[np.signedinteger]
    ) -> None:
        """Raise if `copied` (as filled by `copy_blocks`) holds NaN or an infinity, naming the first one's place.

        Raises:
            TubeletError: a clip that is stored as good holds a non-finite value.
        """
        signed = copied.reshape(-1)
        unsigned = signed.view(np.dtype(f"u{self.bits.itemsize}"))
        # A value is not finite if its exponent bits are all ones. Those come last among the positive values, ordered as
        # signed integers, and among the negative ones, ordered as unsigned integers.
        positive, negative = _INFINITY[self.store.plan.dtype]
        for start in range(0, len(signed), _SCAN_VALUES):
            part = slice(start, start + _SCAN_VALUES)
            if signed[part].max() < positive and unsigned[part].max() < negative:
                continue
            first = np.argmax((signed[part] >= positive) | (unsigned[part] >= negative))
            token, channel = divmod(start + int(first), self.channels)
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
        if self.store.cache is not None:
            # Held only while it is read: a thread that waits for a shard must not hold another one (deadlock).
            return self._mapped(shard)
        with self._opening:
            if shard not in self._open:
                while len(self._open) >= _OPEN_MAPS:
                    del self._open[next(iter(self._open))]
                self._open[shard] = self._mapped(shard)
            return self._open[shard]

    def _mapped(self, shard: int) -> NDArray[np.signedinteger]:
        return self.store.shard_map(self.hook, shard).view(self.bits).reshape(-1, self.block_patches * self.channels)


def _blocks_read() -> int:
    """Blocks of 512 bytes read from disk for this thread so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


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
