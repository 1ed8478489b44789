"""The bytes of a store: keys, Zarr metadata documents, and the inside of a shard object.

    shard object = clip 0 | clip 1 | ... | clip n-1 | index | crc32c(index)
                   ^ offset 0: C-order array, page-aligned for a memory map

The index is zarr's own (codec `sharding_indexed`, index at the end): (offset, bytes) per inner chunk as little-endian
uint64. Clips beyond the data set's end (last shard only) are marked absent, so the object holds no padding. Zarr allows
inner chunks in any order, so a reader checks the index before it maps the clips as one array.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.core.buffer.cpu import Buffer as CpuBuffer
from zarr.storage import MemoryStore

from tubelet.errors import TubeletError
from tubelet_store import bfloat16
from tubelet_store.moments import Moments
from tubelet_store.object_keys import ACTIVATIONS, DIMENSIONS, MOMENTS, SPECIAL, SPECIAL_DIMENSIONS
from tubelet_store.plan import Hook, Plan

_ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4

bfloat16.register()


def clip_shape(plan: Plan, kind: str, hook: Hook) -> tuple[int, int, int]:
    """Shape of one clip in the array of `kind` at `hook`."""
    return plan.clip_shape(hook) if kind == ACTIVATIONS else plan.special_shape(hook)


def array_kinds(plan: Plan) -> tuple[str, ...]:
    """The kinds of array the plan asks for."""
    return (ACTIVATIONS, SPECIAL) if plan.special_tokens else (ACTIVATIONS,)


def clip_bytes(plan: Plan, kind: str, hook: Hook) -> int:
    """Bytes of one clip."""
    return math.prod(clip_shape(plan, kind, hook)) * plan.numpy_dtype.itemsize


def index_bytes(plan: Plan) -> int:
    """Bytes of a shard's index with its checksum."""
    return 16 * plan.clips_per_shard + _CRC_BYTES


def shard_bytes(plan: Plan, kind: str, hook: Hook, shard: int) -> int:
    """Bytes of a whole shard object."""
    return len(plan.shard_range(shard)) * clip_bytes(plan, kind, hook) + index_bytes(plan)


def encode_index(plan: Plan, kind: str, hook: Hook, shard: int) -> bytes:
    """The index of a shard whose clips lie back to back from offset 0."""
    size, present = clip_bytes(plan, kind, hook), len(plan.shard_range(shard))
    index = np.full((plan.clips_per_shard, 2), _ABSENT, dtype="<u8")
    index[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(size)
    index[:present, 1] = size
    raw = index.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(_CRC_BYTES, "little")


def check_index(plan: Plan, kind: str, hook: Hook, shard: int, raw: bytes, name: str) -> None:
    """Refuse a shard (called `name`) whose index is damaged or does not describe the contiguous view.

    Raises:
        TubeletError: the checksum does not fit, or the clips do not lie back to back from offset 0.
    """
    body, checksum = raw[:-_CRC_BYTES], int.from_bytes(raw[-_CRC_BYTES:], "little")
    if int(google_crc32c.value(body)) != checksum:
        raise TubeletError(f"{name}: the shard index is damaged", "Run `tubelet verify`, fetch the object again")
    if raw != encode_index(plan, kind, hook, shard):
        raise TubeletError(
            f"{name}: the clips do not lie in order from offset 0 (another program rewrote this shard?)",
            "Read it with zarr-python, or copy it with `tubelet`, which writes them in order",
        )


def metadata_documents(plan: Plan, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Every zarr.json of a new store, by key; made by zarr-python so that they are what it expects."""
    documents: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(documents), attributes={"tubelet": attributes})
    for kind in array_kinds(plan):
        folder = root.create_group(kind)
        for hook in plan.hooks:
            shape = clip_shape(plan, kind, hook)
            folder.create_array(
                hook.name,
                shape=(plan.clips, *shape),
                chunks=(1, *shape),
                shards=(plan.clips_per_shard, *shape),
                dtype=plan.numpy_dtype,
                # Raw bytes: with zarr's default compressor nothing could be memory-mapped.
                compressors=None,
                filters=None,
                fill_value=float("nan"),
                dimension_names=DIMENSIONS if kind == ACTIVATIONS else SPECIAL_DIMENSIONS,
            )
    return {key: buffer.to_bytes() for key, buffer in documents.items()}


def moments_documents(moments: dict[str, Moments]) -> dict[str, bytes]:
    """Objects of the `moments` group: one sub-group per hook, one uncompressed array per statistic."""
    documents: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(documents))
    folder = root.create_group(MOMENTS)
    for hook, of_hook in moments.items():
        group = folder.create_group(hook)
        for name, values in of_hook.arrays().items():
            _write_array(group, name, values)
    return {key: buffer.to_bytes() for key, buffer in documents.items() if key.startswith(MOMENTS)}


def _write_array(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    with warnings.catch_warnings():
        # zarr warns about zero-dimensional arrays' chunks; scalars are what we mean.
        warnings.simplefilter("ignore")
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape or (),
            compressors=None,
            config={"write_empty_chunks": True},
        )
        array[...] = values


def read_moments(documents: dict[str, bytes], hook: str) -> Moments:
    """Inverse of `moments_documents` for one hook.

    Raises:
        ValueError: a value is missing (zarr would read zeros in its place).
    """
    buffers: dict[str, Buffer] = {key: CpuBuffer.from_bytes(data) for key, data in documents.items()}
    group = zarr.open_group(MemoryStore(buffers), path=f"{MOMENTS}/{hook}", mode="r")
    arrays = dict(group.arrays())
    for name, array in arrays.items():
        if (chunk := "/".join([MOMENTS, hook, name, "c", *["0"] * array.ndim])) not in documents:
            raise ValueError(f"{chunk} is missing")
    return Moments.from_arrays({name: np.asarray(array[...]) for name, array in arrays.items()})
