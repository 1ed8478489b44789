"""The machine a run uses: its memory settings, and the versions that bitwise repetition depends on."""

from __future__ import annotations

import ctypes
import platform
import sys
from importlib.metadata import version

import torch
from pydantic import JsonValue

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Let this process keep the memory it frees, for a training on the CPU; Linux with glibc, elsewhere nothing.

    A step allocates arrays of 10 to 500 MB (gradients, for example). By default malloc maps and unmaps each, and page
    faults make filling 50 MB take 28 ms instead of 3.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def software() -> dict[str, JsonValue]:
    """Versions and thread count that bitwise repetition depends on."""
    return {
        "tubelet": version("tubelet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
