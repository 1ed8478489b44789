"""Numbers that change from step to step, held where the step computes, so that the step itself is always the same.

    step number ─▶ begin ─▶ Knob.set ─▶ (a copy that waits for nothing) ─▶ tensor on the device ─▶ the step reads it

A captured CUDA graph repeats its kernels on the same memory: what it should see anew has to be written there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceScalar:
    """A number, or several, on a device; 0-dimensional or [M].

    Args:
        value: What it starts as; later ones have as many numbers.
        dtype: Of the tensor.
    """

    def __init__(self, value: float | Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self._tensor = torch.tensor(value, dtype=dtype)

    @property
    def size(self) -> int:
        """How many numbers."""
        return self._tensor.numel()

    def on(self, device: torch.device) -> Tensor:
        """The tensor, at the same place each time once it is on `device`."""
        if self._tensor.device != device:
            self._tensor = self._tensor.to(device)
        return self._tensor

    def set(self, value: float | Sequence[float]) -> None:
        """Write `value` behind what the device still has to do."""
        fresh = torch.tensor(value, dtype=self._tensor.dtype)
        if self._tensor.is_cuda:
            # From pinned memory a copy does not wait; the allocator keeps it until it is done.
            fresh = fresh.pin_memory()
        self._tensor.copy_(fresh, non_blocking=True)
