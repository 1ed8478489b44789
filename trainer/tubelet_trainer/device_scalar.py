"""Numbers that change from step to step, as tensors at a fixed place on the device.

    begin(step) ─▶ DeviceScalar.set ─▶ asynchronous copy ─▶ tensor on the device ─▶ the step reads it

A recorded CUDA graph replays its kernels on the same memory, so values that change must be written there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceScalar:
    """One number (0-dimensional) or several ([M]) on a device.

    Args:
        value: Initial value; later ones have as many numbers.
        dtype: Of the tensor.
    """

    def __init__(self, value: float | Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self._tensor = torch.tensor(value, dtype=dtype)

    @property
    def size(self) -> int:
        """Count of numbers."""
        return self._tensor.numel()

    def on(self, device: torch.device) -> Tensor:
        """The tensor; once it is on `device`, always the same one."""
        if self._tensor.device != device:
            self._tensor = self._tensor.to(device)
        return self._tensor

    def set(self, value: float | Sequence[float]) -> None:
        """Write `value`, ordered after the work already queued on the device."""
        fresh = torch.tensor(value, dtype=self._tensor.dtype)
        if self._tensor.is_cuda:
            # A copy from pinned memory is asynchronous; the allocator keeps the memory until it is done.
            fresh = fresh.pin_memory()
        self._tensor.copy_(fresh, non_blocking=True)
