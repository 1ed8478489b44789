"""The background thread that reads windows: window w + 1 while w is consumed.

blocks of w + 2 ─▶ the kernel reads ahead      blocks of w + 1 ─▶ copied ─▶ checked for NaN ─▶ copied to the device
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_store.plan import Grid
from tubelet_trainer.data.buffers import Buffer
from tubelet_trainer.data.order import WindowBlocks, WindowOrder
from tubelet_trainer.data.source import Source

# Threads that copy. On two cores a second one made copying 1.3 times as fast, but there training needs the other core.
_COPIERS = max(1, min(4, len(os.sched_getaffinity(0)) // 2))


@dataclass(frozen=True)
class Locations:
    """Positions (see `Batch.positions`) of the rows of a window; row (block x time + step) x patches + patch."""

    grid: Grid
    block_patches: int
    clip_offset: int
    """Offset of clip numbers in positions."""
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
        """[rows of the window] Computed once: divisions for each batch took half as long as gathering its tokens."""
        inside = torch.arange(self.block_tokens, device=self.on_device.device)
        steps, patches = inside // self.block_patches, inside % self.block_patches
        return (self.on_device[:, None] + (steps * self.grid.space + patches)).flatten()

    def clips(self, rows: Tensor) -> Tensor:
        """Clips of the tokens at `rows`, as the store counts them."""
        return self.positions(rows) // self.grid.tokens - self.clip_offset

    def clips_on_host(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same plus `clip_offset`, without synchronizing with the device."""
        return self.first_position[rows // self.block_tokens] // self.grid.tokens


@dataclass(frozen=True)
class Window:
    """A window on the device."""

    tokens: tuple[Tensor, ...]
    """Per hook [window tokens, D] in the store's dtype."""
    order: NDArray[np.int64]
    """[tokens] Rows of the window in the order they are served."""
    rows: Tensor
    """The same on the device."""
    locations: Locations
    """Positions of its rows."""


@dataclass(frozen=True)
class _Staged:
    buffer: Buffer
    blocks: WindowBlocks
    order: NDArray[np.int64]
    first: NDArray[np.int64]
    """[K] Position of each block's first token."""
    numbers: tuple[Tensor, ...]
    """`order` and `first` on the device."""


class Prefetcher:
    """Fills buffers with the windows of one stream.

    Args:
        sources: Sources of the tokens, one per hook.
        order: The order of the stream.
        device: Device of the windows.
        clip_offset: Added to clip numbers in positions.
        group_begins: Called with (epoch, window) before each window is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: WindowOrder,
        device: torch.device,
        clip_offset: int,
        group_begins: Callable[[int, int], None],
    ) -> None:
        self._sources, self._order, self._device, self._clip_offset = sources, order, device, clip_offset
        self._group_begins = group_begins
        self._checked = np.zeros(order.blocks if device.type != "cuda" else 0, dtype=bool)
        """[blocks] Blocks already checked to be finite; shards never change."""

    @contextmanager
    def windows(self, buffers: Sequence[Buffer], start: int, stop: int) -> Iterator[Iterator[Window]]:
        """The windows that hold stream positions [start, stop), each filled while the one before is consumed.

        Raises:
            TubeletError: a token is not finite, or a shard cannot be read (by the iterator).
        """
        ready: queue.Queue[_Staged | BaseException] = queue.Queue()
        free: queue.Queue[Buffer | None] = queue.Queue()
        for buffer in buffers:
            free.put(buffer)
        thread = threading.Thread(
            target=self._run, args=(start, stop, free, ready), name="tubelet-prefetcher", daemon=True
        )
        thread.start()
        try:
            yield self._served(start, stop, free, ready)
        finally:
            for buffer in buffers:
                buffer.release()
            free.put(None)
            thread.join()
            # A window that was read but not served may still be copied into memory that is freed next.
            for buffer in buffers:
                if buffer.copied is not None:
                    buffer.copied.synchronize()

    def _served(
        self,
        start: int,
        stop: int,
        free: queue.Queue[Buffer | None],
        ready: queue.Queue[_Staged | BaseException],
    ) -> Iterator[Window]:
        position = start
        while position < stop:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield self._arrived(item)
            position = self._end_of(position)
            item.buffer.release()
            free.put(item.buffer)

    def _arrived(self, staged: _Staged) -> Window:
        """The window on the device, once the copy is done, which also checks that it is finite."""
        source, buffer, blocks = self._sources[0], staged.buffer, staged.blocks
        if buffer.copied is not None and buffer.finite is not None:
            # Usually done long ago, while the window before was consumed.
            buffer.copied.synchronize()
            for each, host, finite in zip(self._sources, buffer.host, buffer.finite.tolist(), strict=True):
                # The sum may also have overflowed.
                if not finite:
                    each.refuse_nonfinite(blocks.clips, blocks.groups, _bits(host, each, blocks))
        rows, first = staged.numbers
        where = Locations(source.grid, source.block_patches, self._clip_offset, staged.first, first)
        return Window(buffer.device, staged.order, rows, where)

    def _run(
        self,
        start: int,
        stop: int,
        free: queue.Queue[Buffer | None],
        ready: queue.Queue[_Staged | BaseException],
    ) -> None:
        """Body of the thread."""
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            position, coming = start, self._ahead(start, stop)
            with ThreadPoolExecutor(_COPIERS + 1, thread_name_prefix="tubelet-copier") as pool:
                while coming is not None:
                    blocks, end = coming, self._end_of(position)
                    buffer = free.get()
                    if buffer is None:
                        return
                    place = self._order.locate(position)
                    self._group_begins(*place)
                    coming = self._ahead(end, stop)
                    # In parallel with the copying: drawing the order takes a fifth of its time.
                    drawn = pool.submit(self._order.rows, *place)
                    self._copy(buffer, blocks, pool)
                    order, first = drawn.result(), self._first(blocks)
                    numbers = buffer.upload(len(order), (order, first), stream)
                    ready.put(_Staged(buffer, blocks, order, first, numbers))
                    position = end
        except BaseException as error:  # the consumer raises it
            ready.put(error)

    def _end_of(self, position: int) -> int:
        """Where the window that holds stream position `position` ends."""
        epoch, window = self._order.locate(position)
        return self._order.start(epoch, window + 1)

    def _ahead(self, position: int, stop: int) -> WindowBlocks | None:
        """Blocks of the window at `position`, being read into the page cache; None where the stream ends."""
        if position >= stop:
            return None
        blocks = self._order.window(*self._order.locate(position))
        for source in self._sources:
            source.read_ahead(blocks.clips, blocks.groups)
        return blocks

    def _first(self, blocks: WindowBlocks) -> NDArray[np.int64]:
        """[K] Position of each block's first token."""
        source = self._sources[0]
        return (blocks.clips + self._clip_offset) * source.grid.tokens + blocks.groups * source.block_patches

    def _copy(self, buffer: Buffer, blocks: WindowBlocks, pool: ThreadPoolExecutor) -> None:
        """Copy a window's blocks from the memory maps to the buffer's host side."""
        if buffer.copied is not None:
            buffer.copied.synchronize()  # the host side may still be being copied to the device
        # A GPU sums the window at almost no cost; on the CPU each block is searched once.
        check = buffer.finite is None and not self._checked[blocks.numbers].all()
        count = len(blocks.clips)
        # Through a cache one shard after the other, see `Source`.
        threads = _COPIERS if self._sources[0].store.cache is None else 1

        def copy(thread: int) -> None:
            part = slice(count * thread // threads, count * (thread + 1) // threads)
            clips, groups = blocks.clips[part], blocks.groups[part]
            for source, host in zip(self._sources, buffer.host, strict=True):
                bits = _bits(host, source, blocks)[part]
                source.copy_blocks(clips, groups, bits)
                if check:
                    source.refuse_nonfinite(clips, groups, bits)

        for _ in pool.map(copy, range(threads)):
            pass
        if check:
            self._checked[blocks.numbers] = True


def _bits(host: Tensor, source: Source, blocks: WindowBlocks) -> NDArray[np.signedinteger]:
    """A window's memory as `Source.copy_blocks` fills it."""
    flat: NDArray[np.signedinteger] = host.view(torch.int16 if source.bits.itemsize == 2 else torch.int32).numpy()
    shape = (len(blocks.clips), source.grid.time, source.block_patches, source.channels)
    return flat[: len(blocks.clips) * source.block_tokens].reshape(shape)
