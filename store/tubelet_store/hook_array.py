"""All clips of a store at one hook as one lazy array.

    store["blocks.3"][17]                 a clip: a view of the memory map [time, space, channel]
    store["blocks.3"][[3, 1, 900]]        clips from several shards: a copy of just these
    store["blocks.3"].torch()             all shards as a torch tensor, a copy in memory
    store["blocks.3"].torch(0)            one shard as a torch tensor, without a copy
    store["blocks.3"].dask(), .xarray()   the whole, lazily

Shards of a remote store are fetched into the local cache and verified.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet.formats import human_bytes
from tubelet.tables import Table
from tubelet_store.format import clip_shape
from tubelet_store.object_keys import ACTIVATIONS, DIMENSIONS, SPECIAL_DIMENSIONS

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray

    from tubelet_store.reader import Store


class HookArray:
    """Activations [clip, time, space, channel] (or special tokens) of `store` at `hook`. Get one from `store[hook]`.

    Indexing is NumPy's, with an integer, a slice, a list of integers or a boolean mask on the first axis. Clips of
    one shard are returned as a read-only view of its memory map, clips of several shards as a copy.

    Raises:
        TubeletError: the store has no such hook, or no special tokens.
    """

    def __init__(self, store: Store, hook: str, kind: str = ACTIVATIONS) -> None:
        of_hook = store.plan.hook(hook)
        if kind != ACTIVATIONS and not store.plan.special_tokens:
            raise TubeletError(f"{store.url} has no special tokens", f"store['{hook}'] gives the tokens of the grid")
        self.store, self.hook, self.kind = store, hook, kind
        self.shape: tuple[int, int, int, int] = (store.plan.clips, *clip_shape(store.plan, kind, of_hook))
        self.dtype = store.plan.numpy_dtype
        self.ndim = 4
        self.dims = DIMENSIONS if kind == ACTIVATIONS else SPECIAL_DIMENSIONS

    def __reduce__(self) -> tuple[Any, ...]:
        # A Dask worker gets the URL and opens the store again, with its own memory maps.
        return (HookArray, (self.store, self.hook, self.kind))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    def shard(self, shard: int) -> NDArray[Any]:
        """Shard `shard` as a read-only memory map [clips in the shard, time, space, channel]."""
        return self.store.shard_map(self.hook, shard, self.kind)

    def torch(self, shard: int | None = None) -> torch.Tensor:
        """One shard as a torch tensor without a copy, or all shards as one tensor, which is a copy in memory.

        torch has no read-only tensors: the map of a shard is private, so writing to the tensor changes neither the file
        nor another view of it.

        Args:
            shard: Number of the shard; None: all of them, [clip, time, space, channel] in the store's dtype.

        Raises:
            TubeletError: all shards together take more than half of the available memory.
        """
        import torch

        if shard is None:
            available_bytes = available_memory()
            if self.nbytes > available_bytes / 2:
                raise TubeletError(
                    f"'{self.hook}' of {self.store.url} takes {human_bytes(self.nbytes)}, more than half of the"
                    f" {human_bytes(available_bytes)} of memory that is available",
                    "Use .dask() for all shards, or .torch(i) for shard i",
                )
            whole = torch.empty(self.shape, dtype=getattr(torch, self.store.plan.dtype))
            for number in range(self.store.plan.shards):
                clips = self.store.plan.shard_range(number)
                whole[clips.start : clips.stop] = self.torch(number)
            return whole
        mapped = self.store.shard_map(self.hook, shard, self.kind, private=True)
        # NumPy and torch share no bfloat16: bits go over, and are read as what they are.
        bits = mapped.view(np.int16 if self.dtype.itemsize == 2 else np.int32)
        return torch.from_numpy(bits).view(getattr(torch, self.store.plan.dtype))

    def dask(self) -> dask.array.Array:
        """The whole as a dask array, one chunk per shard."""
        import dask.array

        chunks = (self.store.plan.clips_per_shard, *self.shape[1:])
        name = f"tubelet-{self.kind}-{self.hook}-{self.store.identity}"
        return dask.array.from_array(self, chunks=chunks, name=name, asarray=False, fancy=False)

    def xarray(self) -> xarray.DataArray:
        """The whole as a lazy xarray, with video id, label name, split and status along the clips."""
        import xarray

        table = self.store.clips()
        if table.num_rows != len(self):
            raise TubeletError(f"{self.store.url} is unfinished", "Finish its extraction first")
        names = ("video_id", "label_name", "split", "status")
        coordinates = {name: ("clip", np.asarray(table[name].to_pylist(), dtype=object)) for name in names}
        attributes = {"store": self.store.url, "identity": self.store.identity, "hook": self.hook}
        return xarray.DataArray(self.dask(), coordinates, dims=self.dims, name=self.hook, attrs=attributes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a store of several shards is no single array: reading it whole makes a copy")
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is Ellipsis or first is None:
            missing = self.ndim - len([k for k in rest if k is not None])
            if first is None:
                raise IndexError("a new axis goes behind what is read: array[...][None]")
            first, rest = slice(None), [slice(None)] * (missing - 1) + rest
        inner = tuple(rest)
        if isinstance(first, int | np.integer):
            clip = range(len(self))[int(first)]
            shard, row = divmod(clip, self.store.plan.clips_per_shard)
            return np.asarray(self.store.shard_map(self.hook, shard, self.kind)[(row, *inner)])
        if isinstance(first, slice):
            return self._range(range(len(self))[first], inner)
        return self._gather(np.asarray(first), inner)

    def _range(self, clips: range, inner: tuple[Any, ...]) -> NDArray[Any]:
        each = self.store.plan.clips_per_shard
        if len(clips) and clips.step > 0 and clips[0] // each == clips[-1] // each:
            start = clips[0] // each * each
            rows = slice(clips[0] - start, clips[-1] - start + 1, clips.step)
            return np.asarray(self.shard(clips[0] // each)[(rows, *inner)])
        return self._gather(np.asarray(clips, dtype=np.int64), inner)

    def _gather(self, clips: NDArray[Any], inner: tuple[Any, ...]) -> NDArray[Any]:
        if clips.ndim != 1 or clips.dtype.kind not in "biu":
            raise IndexError("clips are chosen by an integer, a slice, a list of integers or a mask [clips]")
        if clips.dtype.kind == "b":
            if len(clips) != len(self):
                raise IndexError(f"a mask of {len(clips)} for {len(self)} clips")
            clips = np.flatnonzero(clips)
        if len(clips) and not (-len(self) <= int(clips.min()) and int(clips.max()) < len(self)):
            raise IndexError(f"clip {int(clips[np.argmax(np.abs(clips))])} of {len(self)}")
        clips = np.where(clips < 0, clips + len(self), clips)
        each = self.store.plan.clips_per_shard
        # Of no clips, the shape alone.
        pattern = np.broadcast_to(np.zeros((), self.dtype), self.shape[1:])[inner]
        out = np.empty((len(clips), *pattern.shape), dtype=self.dtype)
        shards = clips // each
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            mapped = self.shard(int(shard))
            for place in places:
                out[place] = mapped[(int(clips[place]) - int(shard) * each, *inner)]
        return out

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.dims, self.shape, strict=True))
        return f"<{self.kind} at {self.hook}: {sizes}, {self.dtype}, {self._human()}, read-only>"

    def _repr_html_(self) -> str:
        sizes = zip(self.dims, self.shape, strict=True)
        rows = [("hook", self.hook), ("holds", self.kind), *sizes, ("dtype", str(self.dtype)), ("size", self._human())]
        return Table.of_rows(("array", "value"), rows).html()

    def _human(self) -> str:
        return human_bytes(self.nbytes)


def available_memory() -> int:
    """Bytes of memory that new arrays may take without swapping, within the limit of this process's control group."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    return available
