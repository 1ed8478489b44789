"""The device a computation runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.errors import TubeletError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The device called `name` (`cpu`, `cuda`, `cuda:1`, ...); `auto` is CUDA where there is a GPU, else the CPU.

    Raises:
        TubeletError: the name is no device, or this machine does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TubeletError(
            f"Device '{name}' cannot be used here: {reason}", "Use device cpu or auto, or install torch for this GPU"
        ) from error
    return device
