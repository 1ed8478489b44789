"""Memory of the loader: windows on the host and the device, and batches.

On a GPU, windows are staged in pinned memory, and batches come from torch's caching allocator. On the CPU a window is
gathered from where it was staged. There memory of its own matters: large arrays of NumPy lie on huge pages, into and
out of which copies ran 1.3 and 2 times as fast as with pages of 4 KiB; and a batch in fresh memory costs a page fault
for each of its pages, which took longer than filling it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BITS = {2: np.int16, 4: np.int32}

# Batches kept for use again: of the one in work and the one before.
_KEPT = 2


@dataclass
class Slot:
    """Memory of one window: the host side is filled by the stager, the device side is read by the consumer."""

    host: tuple[Tensor, ...]
    """Per hook [window tokens, D] in the store's dtype; pinned for a GPU."""
    device: tuple[Tensor, ...]
    """The same on the device; on the CPU it *is* `host`."""
    finite: Tensor | None
    """[hooks] bool, pinned: whether what was copied to the device sums to a finite number; on the CPU None."""
    copied: torch.cuda.Event | None
    """The copy to the device, and the sum, are done."""
    released: torch.cuda.Event | None
    """The consumer's last read of the device side is done."""

    @classmethod
    def allocate(cls, tokens: int, channels: Sequence[int], dtype: torch.dtype, device: torch.device) -> Slot:
        """A slot for windows of up to `tokens` tokens of hooks of `channels` channels each."""
        if device.type != "cuda":
            host = tuple(_empty((tokens, each), dtype) for each in channels)
            return cls(host, host, None, None, None)
        slot = cls(
            host=tuple(torch.empty((tokens, each), dtype=dtype, pin_memory=True) for each in channels),
            device=tuple(torch.empty((tokens, each), dtype=dtype, device=device) for each in channels),
            finite=torch.ones(len(channels), dtype=torch.bool, pin_memory=True),
            copied=torch.cuda.Event(),
            released=torch.cuda.Event(),
        )
        # The allocator may hand out memory that earlier work on this stream still reads.
        slot.release()
        return slot

    def release(self) -> None:
        """What reads the device side was all given to the current stream."""
        if self.released is not None:
            self.released.record(torch.cuda.current_stream(self.device[0].device))

    def upload(self, tokens: int, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy the first `tokens` tokens to the device, once its old content was read."""
        if stream is None or self.copied is None or self.released is None or self.finite is None:
            return
        stream.wait_event(self.released)
        with torch.cuda.stream(stream):
            for number, (host, device) in enumerate(zip(self.host, self.device, strict=True)):
                device[:tokens].copy_(host[:tokens], non_blocking=True)
                finite = torch.isfinite(device[:tokens].sum(dtype=torch.float32))
                self.finite[number].copy_(finite, non_blocking=True)
            self.copied.record(stream)


class BatchMemory:
    """Memory for batches: on the CPU used again as soon as nobody holds the tensor that lay there.

    Args:
        rows: Most rows of a batch.
        device: Where batches are wanted.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._free: dict[tuple[int, torch.dtype], list[NDArray[np.generic]]] = {}

    def empty(self, rows: int, channels: int, dtype: torch.dtype) -> Tensor:
        """A tensor [rows, channels] of any content."""
        if self._device.type == "cuda":
            return torch.empty((rows, channels), dtype=dtype, device=self._device)
        free = self._free.setdefault((channels, dtype), [])
        memory = free.pop() if free else np.empty((self._rows, channels), dtype=_BITS[dtype.itemsize])
        # The tensor, and all that shares its memory, keep this view alive; when it goes the memory is free.
        view = memory[:rows]
        weakref.finalize(view, _keep, free, memory).atexit = False
        return torch.from_numpy(view).view(dtype)


def _keep(free: list[NDArray[np.generic]], memory: NDArray[np.generic]) -> None:
    if len(free) < _KEPT:
        free.append(memory)


def _empty(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.empty(shape, dtype=_BITS[dtype.itemsize])).view(dtype)
