"""How many clips fit into one forward pass, where the configuration leaves that open (`batch_size: auto`).

On CUDA it is tried: 1, 2, 4, ... clips of zeros, until memory ends or is fuller than the margin allows. On a CPU a
larger batch gains nothing once the cores are busy, so there it is arithmetic. Both give the same number again on the
same hardware; it is recorded with every shard, because a batch's size may change the last bits of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone

_CPU_MOST = 16
_CPU_BYTES = 256 * 2**20

# Beside a pass there are the pixels of the next batch, and blocks the allocator could not use.
_CUDA_SHARE = 0.8


def find_batch_size(backbone: Backbone, hooks: Iterable[str], most: int) -> int:
    """The largest power of two, at most `most`, of clips that `backbone` takes at once.

    Raises:
        TubeletError: not even one clip fits into the device's memory.
    """
    names = tuple(hooks)
    if backbone.device.type != "cuda":
        clip_bytes = 4 * (_pixels(backbone) + len(names) * backbone.grid.tokens * max(map(backbone.channels, names)))
        return largest_power(lambda clips: clips == 1 or clips * clip_bytes <= _CPU_BYTES, min(most, _CPU_MOST))
    found = largest_power(lambda clips: _fits_cuda(backbone, names, clips), most)
    if not found:
        raise TubeletError(
            f"One clip of '{backbone.checkpoint.name}' does not fit into {_CUDA_SHARE:.0%} of the memory of "
            f"{torch.cuda.get_device_name(backbone.device)}",
            "Set backbone.precision: float16 (or bfloat16), or batch_size: 1 to try anyway",
        )
    return found


def largest_power(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two up to `most` that fits, if all smaller ones do; 0: not even 1 fits."""
    found, size = 0, 1
    while size <= most and fits(size):
        found, size = size, 2 * size
    return found


def _pixels(backbone: Backbone) -> int:
    height, width = backbone.preprocessing.size
    return backbone.frames * 3 * height * width


def _fits_cuda(backbone: Backbone, hooks: tuple[str, ...], clips: int) -> bool:
    device = backbone.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        backbone.activations(torch.zeros(clips, backbone.frames, 3, *backbone.preprocessing.size), hooks)
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    return bool(torch.cuda.max_memory_reserved(device) <= _CUDA_SHARE * total)
