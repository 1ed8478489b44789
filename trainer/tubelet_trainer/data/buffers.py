"""Memory of the loader: windows on the host and the device, and batches.

With a GPU, windows are read into pinned memory, and batches come from torch's caching allocator. On the CPU batches are
gathered from the window where it was read, and alignment and reuse matter: on huge pages copies into it ran 1.3 times
and gathers out of it 1.2 to 2 times as fast as on pages of 4 KiB; copies of whole clips to a multiple of the page size
ran 1.7 times as fast as to 16 bytes beyond. A batch in new memory costs a page fault per page, which took as long as
filling it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PAGE_BYTES = 4096

# Batches kept for use again: of the one in work and the one before.
_KEPT = 2


@dataclass
class Buffer:
    """Memory of one window: the prefetcher fills the host side, the consumer reads the device side."""

    host: tuple[Tensor, ...]
    """Per hook [window tokens, D] in the store's dtype; pinned for a GPU."""
    device: tuple[Tensor, ...]
    """The same on the device; on the CPU it *is* `host`."""
    numbers: tuple[Tensor, Tensor] | None
    """int64 [2 x window tokens], pinned and on the device: order and positions of a window's rows; on the CPU None."""
    finite: Tensor | None
    """[hooks] bool, pinned: whether what was copied to the device sums to a finite number; on the CPU None."""
    copied: torch.cuda.Event | None
    """The copy to the device, and the sum, are done."""
    released: torch.cuda.Event | None
    """The consumer's last read of the device side is done."""

    @classmethod
    def allocate(cls, tokens: int, channels: Sequence[int], dtype: torch.dtype, device: torch.device) -> Buffer:
        """A buffer for windows of up to `tokens` tokens of hooks of `channels` channels each."""
        if device.type != "cuda":
            host = tuple(page_aligned(tokens, each, dtype) for each in channels)
            return cls(host, host, None, None, None, None)
        buffer = cls(
            host=tuple(torch.empty((tokens, each), dtype=dtype, pin_memory=True) for each in channels),
            device=tuple(torch.empty((tokens, each), dtype=dtype, device=device) for each in channels),
            numbers=(
                torch.empty(2 * tokens, dtype=torch.int64, pin_memory=True),
                torch.empty(2 * tokens, dtype=torch.int64, device=device),
            ),
            finite=torch.ones(len(channels), dtype=torch.bool, pin_memory=True),
            copied=torch.cuda.Event(),
            released=torch.cuda.Event(),
        )
        # Earlier work on this stream may still read the memory that the allocator returned.
        buffer.release()
        return buffer

    def release(self) -> None:
        """All reads of the device side are queued on the current stream."""
        if self.released is not None:
            self.released.record(torch.cuda.current_stream(self.device[0].device))

    def upload(
        self, tokens: int, numbers: Sequence[NDArray[np.int64]], stream: torch.cuda.Stream | None
    ) -> tuple[Tensor, ...]:
        """Queue the copy of the first `tokens` tokens, and `numbers`, to the device, after reads of its old content.

        Args:
            tokens: Of the window.
            numbers: Up to two arrays, together of at most twice the buffer's tokens.
            stream: Where copies queue; on the CPU None.

        Returns:
            `numbers` on the device: there when `copied` is, and until the buffer is filled again.
        """
        if stream is None or self.copied is None or self.released is None or self.finite is None or not self.numbers:
            return tuple(torch.from_numpy(each) for each in numbers)
        pinned, there = self.numbers
        sizes = [len(each) for each in numbers]
        for part, each in zip(pinned[: sum(sizes)].split(sizes), numbers, strict=True):
            part.copy_(torch.from_numpy(each))
        stream.wait_event(self.released)
        with torch.cuda.stream(stream):
            there[: sum(sizes)].copy_(pinned[: sum(sizes)], non_blocking=True)
            for number, (host, device) in enumerate(zip(self.host, self.device, strict=True)):
                device[:tokens].copy_(host[:tokens], non_blocking=True)
                finite = torch.isfinite(device[:tokens].sum(dtype=torch.float32))
                self.finite[number].copy_(finite, non_blocking=True)
            self.copied.record(stream)
        return there[: sum(sizes)].split(sizes)


class BatchMemory:
    """Memory for batches, reused on the CPU when the last reference to the previous tensor is gone.

    Args:
        rows: Maximum rows of a batch.
        device: Device of the batches.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._free: dict[tuple[int, torch.dtype], list[NDArray[np.uint8]]] = {}

    def empty(self, rows: int, channels: int, dtype: torch.dtype) -> Tensor:
        """A tensor [rows, channels] of any content."""
        if self._device.type == "cuda":
            return torch.empty((rows, channels), dtype=dtype, device=self._device)
        free = self._free.setdefault((channels, dtype), [])
        memory = free.pop() if free else page_aligned(self._rows, channels, dtype).view(torch.uint8).numpy()
        # The tensor, and all that shares its memory, keep this view alive; without it the memory is free.
        view = memory[:rows]
        weakref.finalize(view, _keep, free, memory).atexit = False
        return torch.from_numpy(view).view(dtype)


def _keep(free: list[NDArray[np.uint8]], memory: NDArray[np.uint8]) -> None:
    if len(free) < _KEPT:
        free.append(memory)


def page_aligned(rows: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Memory [rows, channels] of any content that begins with a page; NumPy requests huge pages if it is large."""
    size_bytes = rows * channels * dtype.itemsize
    memory = np.empty(size_bytes + _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    return torch.from_numpy(memory[start : start + size_bytes]).view(dtype).view(rows, channels)
