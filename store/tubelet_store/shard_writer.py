"""Writer of one shard: takes clips one by one, in order; objects and record appear whole or not at all.

    append(clip 0), append(clip 1), ... ─▶ scratch file per array ─▶ publish objects ─▶ moments ─▶ commit record (last)

Memory use is one clip. One writer owns the whole shard: with several writers per shard, Zarr loses data silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.commit import Commit, StoredObject, encode_commit_moments, stored_moments
from tubelet_store.finished_shard import FinishedShard, publish
from tubelet_store.format import array_kinds, clip_shape, encode_index
from tubelet_store.moments import Moments
from tubelet_store.object_keys import ACTIVATIONS, SPECIAL, shard_key
from tubelet_store.plan import Hook, Plan
from tubelet_store.storage.object_root import ObjectRoot

# Their number is recorded in the clip's error only, so that a shard copied clip by clip has the same moments.
_NONFINITE = re.compile(r"nonfinite: (?P<values>\d+) values of \w+/(?P<hook>\S+) are NaN or infinite")


class ShardWriter:
    """Writes shard `shard` of `plan` below `root`. Use as a context manager: leaving it removes the scratch files."""

    def __init__(self, root: ObjectRoot, plan: Plan, shard: int) -> None:
        self._root, self._plan, self._shard = root, plan, shard
        self._range = plan.shard_range(shard)
        self._outcomes: list[ClipOutcome] = []
        self._moments = {hook.name: Moments.empty(hook.channels) for hook in plan.hooks}
        self._resources = contextlib.ExitStack()
        scratch = self._resources.enter_context(root.scratch())
        self._files = {
            (kind, hook.name): _ObjectFile(scratch / f"{number}-{kind}", plan, kind, hook, shard)
            for kind in array_kinds(plan)
            for number, hook in enumerate(plan.hooks)
        }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._resources.close()

    def append(
        self,
        outcome: ClipOutcome,
        activations: Mapping[str, NDArray[Any]] | None = None,
        special_tokens: Mapping[str, NDArray[Any]] | None = None,
    ) -> ClipOutcome:
        """Add the next clip.

        Args:
            outcome: What is known of the clip; of a failed one the arrays are ignored and NaN is stored.
            activations: Per hook [time, space, channel]; float32 or the store's dtype.
            special_tokens: Per hook [time or 1, token, channel], where the plan has special tokens.

        Returns:
            The outcome as stored: a clip whose activations are not finite is failed, with code `nonfinite`.

        Raises:
            TubeletError: a value is too large for the store's dtype.
            ValueError: more clips than the shard holds, an array of the wrong shape, or patches that are not the
                plan's number of places in ascending order.
        """
        if len(self._outcomes) == len(self._range):
            raise ValueError(f"shard {self._shard} holds {len(self._range)} clips")
        self._check_patches(outcome)
        arrays = {ACTIVATIONS: activations or {}, SPECIAL: special_tokens or {}}
        if outcome.status == "ok":
            outcome = self._check_range(outcome, arrays)
        counted = _NONFINITE.match(outcome.error or "")
        if counted and (hook := counted["hook"]) in self._moments:
            nonfinite = Moments.empty(self._plan.hook(hook).channels, nonfinite=int(counted["values"]))
            self._moments[hook] = self._moments[hook].merge(nonfinite)
        for (kind, hook), file in self._files.items():
            if outcome.status == "failed":
                file.append_nan()
                continue
            stored = np.ascontiguousarray(arrays[kind][hook], dtype=self._plan.numpy_dtype)
            file.append(stored)
            if kind == ACTIVATIONS:
                tokens_ND = stored.reshape(-1, stored.shape[-1])
                self._moments[hook] = self._moments[hook].merge(Moments.of(tokens_ND))
        self._outcomes.append(outcome)
        return outcome

    def finish(
        self, software: Mapping[str, str] | None = None, seconds: Mapping[str, float] | None = None
    ) -> FinishedShard:
        """What there is to publish, once all clips are in. Its files last as long as this writer.

        Raises:
            ValueError: clips are missing.
        """
        if len(self._outcomes) != len(self._range):
            raise ValueError(f"shard {self._shard} has {len(self._outcomes)} of {len(self._range)} clips")
        objects = tuple(file.finish() for file in self._files.values())
        moments = encode_commit_moments(self._moments)
        commit = Commit(
            plan=self._plan.digest,
            shard=self._shard,
            objects=objects,
            moments=stored_moments(self._shard, moments),
            clips=tuple(self._outcomes),
            software=dict(software or {}),
            seconds=dict(seconds or {}),
        )
        return FinishedShard(commit, moments, {file.key: file.path for file in self._files.values()})

    def commit(self, software: Mapping[str, str] | None = None, seconds: Mapping[str, float] | None = None) -> Commit:
        """Publish the objects, then the record.

        Returns:
            The record that counts: this one, or that of another writer of the same shard who was first.

        Raises:
            ValueError: clips are missing.
        """
        return publish(self._root, self._plan, self.finish(software, seconds))

    def _check_patches(self, outcome: ClipOutcome) -> None:
        plan = self._plan
        some = plan.position_grid != plan.grid
        if outcome.status == "failed" or (not some and outcome.patches is None):
            return
        patches = outcome.patches or ()
        ascending = all(a < b for a, b in zip((-1, *patches), (*patches, plan.position_grid.space), strict=True))
        if not some or len(patches) != plan.grid.space or not ascending:
            wanted = f"{plan.grid.space} of {plan.position_grid.space}, ascending" if some else "none"
            raise ValueError(f"clip {self._range[len(self._outcomes)]}: patches {patches}, the plan requires {wanted}")

    def _check_range(self, outcome: ClipOutcome, arrays: Mapping[str, Mapping[str, NDArray[Any]]]) -> ClipOutcome:
        limit = float(ml_dtypes.finfo(self._plan.numpy_dtype).max)
        for kind in array_kinds(self._plan):
            for hook in self._plan.hooks:
                values = arrays[kind][hook.name]
                peak = float(np.max(np.abs(values), initial=0.0))
                if np.isfinite(peak) and peak <= limit:
                    continue
                if not np.isfinite(peak):
                    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
                    error = f"nonfinite: {bad} values of {kind}/{hook.name} are NaN or infinite"
                    return outcome.model_copy(update={"status": "failed", "error": error})
                clip = self._range[len(self._outcomes)]
                raise TubeletError(
                    f"Clip {clip}, {kind}/{hook.name}: value {peak:.4g} exceeds the {self._plan.dtype} maximum"
                    f" ({limit:.4g})",
                    "Set `dtype: bfloat16` (same size, range of float32) and extract into a new store",
                )
        return outcome


class _ObjectFile:
    """A shard object in the making: bytes, digest and per-clip checksums grow clip by clip."""

    def __init__(self, path: Path, plan: Plan, kind: str, hook: Hook, shard: int) -> None:
        self.path = path
        self.key = shard_key(kind, hook.name, shard)
        self._shape = clip_shape(plan, kind, hook)
        self._tail = encode_index(plan, kind, hook, shard)
        self._nan = np.full(self._shape, np.nan, dtype=plan.numpy_dtype)
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._crc32c: list[int] = []
        self._size_bytes = 0

    def append(self, values: NDArray[Any]) -> None:
        if values.shape != self._shape:
            raise ValueError(f"{self.key}: clip of shape {values.shape}, expected {self._shape}")
        # A view as bytes: ml_dtypes arrays do not speak the buffer protocol.
        raw = values.view(np.uint8).reshape(-1)
        self._crc32c.append(int(google_crc32c.value(raw.tobytes())))
        self._write(raw.data)

    def append_nan(self) -> None:
        self.append(self._nan)

    def finish(self) -> StoredObject:
        self._write(memoryview(self._tail))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return StoredObject(
            key=self.key,
            size_bytes=self._size_bytes,
            sha256=self._digest.hexdigest(),
            crc32c=tuple(self._crc32c),
        )

    def close(self) -> None:
        self._file.close()

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size_bytes += len(data)
