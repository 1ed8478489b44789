"""The machine a run uses: its device, and the versions that bitwise repetition depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
from pydantic import JsonValue

from tubelet_store import TubeletError


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if there is one.

    Raises:
        TubeletError: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TubeletError(
            "device is 'cuda', but torch finds no GPU here", "Use --device cpu, or install torch for CUDA"
        )
    return torch.device(name)


def software() -> dict[str, JsonValue]:
    """Versions and thread count that bitwise repetition depends on."""
    return {
        "tubelet": version("tubelet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
