"""A store as its readers see it: plan, clip table, moments, and shards as read-only memory maps.

open_store(url) ─▶ Store ─▶ shard_map(hook, i): the file itself, as an array [clip, time, space, channel]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tubelet_store.clips import FINISHED, finished_table, from_parquet
from tubelet_store.commit import Commit, committed_shards, read_commit, read_commit_moments
from tubelet_store.errors import TubeletError
from tubelet_store.layout import (
    ACTIVATIONS,
    CLIPS,
    MANIFEST,
    MOMENTS,
    PLAN_TABLE,
    check_index,
    clip_bytes,
    clip_shape,
    index_bytes,
    read_moments,
    shard_bytes,
    shard_key,
)
from tubelet_store.manifest import Manifest
from tubelet_store.moments import Moments
from tubelet_store.objects import ObjectRoot, open_root
from tubelet_store.plan import Plan
from tubelet_store.state import StoreState, read_state

T = TypeVar("T")

# What Arrow, zarr, pydantic and NumPy raise over bytes that are not what was written.
_DAMAGE = (pa.ArrowException, LookupError, NotImplementedError, OSError, TypeError, ValueError)


class Store:
    """A readable store. Everything it gives is read-only."""

    def __init__(self, root: ObjectRoot, state: StoreState) -> None:
        self.root = root
        self.state = state
        self.plan: Plan = state.plan
        self.url: str = root.url

    def __repr__(self) -> str:
        plan = self.plan
        hooks = ", ".join(f"{hook.name} [{hook.channels}]" for hook in plan.hooks)
        grid = f"{plan.grid.time}x{plan.grid.height}x{plan.grid.width}"
        return f"<Store {self.url} ({self.state.state}): {plan.clips} clips, grid {grid}, {plan.dtype}, hooks {hooks}>"

    @property
    def complete(self) -> bool:
        """Every shard is committed and merged."""
        return self.state.complete

    @property
    def identity(self) -> str:
        """Digest of the manifest, or of the plan while the store is unfinished."""
        return self.state.identity or self.plan.digest

    @cached_property
    def committed(self) -> tuple[int, ...]:
        """Shards that may be read, ascending."""
        return tuple(range(self.plan.shards)) if self.complete else tuple(committed_shards(self.root))

    @cached_property
    def _table(self) -> pa.Table:
        if self.complete:
            return self._parsed(CLIPS, self._finished_table)
        planned = from_parquet(self.root.read(PLAN_TABLE))
        rows = [clip for shard in self.committed for clip in self.plan.shard_range(shard)]
        outcomes = [outcome for shard in self.committed for outcome in self.commit(shard).clips]
        finished = finished_table(planned.take(pa.array(rows, pa.int64())), outcomes, self.plan.clips_per_shard)
        shards = [clip // self.plan.clips_per_shard for clip in rows]
        return finished.set_column(
            finished.num_columns - 1, finished.schema.field("shard"), pa.array(shards, pa.int32())
        )

    def clips(self) -> pa.Table:
        """The clip table in array order; of an unfinished store, the rows of committed shards."""
        return self._table

    def ok(self) -> NDArray[np.bool_]:
        """[plan.clips] Clips that hold activations; the others hold NaN or are not committed."""
        mask = np.zeros(self.plan.clips, dtype=bool)
        table = self.clips()
        status = np.asarray(table["status"].to_pylist(), dtype=object)
        mask[table["clip"].to_numpy()] = status == "ok"
        return mask

    def _finished_table(self, data: bytes) -> pa.Table:
        table = from_parquet(data)
        if table.num_rows != self.plan.clips:
            raise ValueError(f"{table.num_rows} rows for {self.plan.clips} clips")
        return table.select(FINISHED.names)

    def _parsed(self, key: str, parse: Callable[[bytes], T]) -> T:
        try:
            data = self.root.read(key)
        except FileNotFoundError as error:
            raise TubeletError(f"{self.url}/{key} is missing", "Copy the store again from its source") from error
        try:
            return parse(data)
        except _DAMAGE as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: Exception) -> TubeletError:
        detail = " ".join(str(error).split())
        return TubeletError(f"{self.url}/{key} is damaged: {detail}", "Copy it again from the store's source")

    def shard_range(self, shard: int) -> range:
        """Clip numbers in `shard`."""
        return self.plan.shard_range(shard)

    def commit(self, shard: int) -> Commit:
        """The commit record of `shard`.

        Raises:
            TubeletError: the shard is not committed.
        """
        commit = read_commit(self.root, shard)
        if commit is None:
            raise TubeletError(f"{self.url}: shard {shard} is not committed", "Finish the extraction: run it again")
        return commit

    def manifest(self) -> Manifest:
        """The manifest of a complete store.

        Raises:
            TubeletError: it is missing, or it is not the one the store was completed with.
        """
        manifest = self._parsed(MANIFEST, lambda data: Manifest.from_parquet(data, self.plan.digest))
        if manifest.identity != self.state.identity:
            raise TubeletError(
                f"{self.url}/{MANIFEST} has identity {manifest.identity}, the store says {self.state.identity}",
                "One of the two was changed: copy the store again from its source",
            )
        return manifest

    def moments(self, hook: str) -> Moments:
        """Moments of all stored tokens at `hook`, in float64."""
        self.plan.hook(hook)
        if self.complete:
            folder = f"{MOMENTS}/{hook}"
            documents = {key: self.root.read(key) for key in self.root.list_keys(folder)}
            try:
                return read_moments(documents, hook)
            except _DAMAGE as error:
                raise self._damaged(folder, error) from error
        merged = Moments.empty(self.plan.hook(hook).channels)
        for shard in self.committed:
            merged = merged.merge(read_commit_moments(self.root, self.commit(shard))[hook])
        return merged

    def shard_map(self, hook: str, shard: int, kind: str = ACTIVATIONS) -> NDArray[Any]:
        """Shard `shard` at `hook` as a read-only memory map [clip, time, space, channel] in the store's dtype.

        Args:
            hook: Name of the hook.
            shard: Number of the shard.
            kind: `activations`, or `special_tokens` ([clip, time or 1, token, channel]).

        Raises:
            TubeletError: no such hook; the shard is not committed, missing, truncated, or not in order; the store is
                remote.
        """
        of_hook = self.plan.hook(hook)
        if shard not in self.committed:
            raise TubeletError(f"{self.url}: shard {shard} is not committed", "Finish the extraction: run it again")
        key = shard_key(kind, hook, shard)
        path = self.root.local_path(key)
        if path is None:
            raise TubeletError(
                f"{self.url} is remote and cannot be memory-mapped", "Copy the store to a local disk first"
            )
        name = f"{self.url}/{key}"
        expected = shard_bytes(self.plan, kind, of_hook, shard)
        found = self.root.size(key)
        if found is None:
            raise TubeletError(f"{name} is missing", "Run `tubelet verify`, then copy the store again")
        if found != expected:
            raise TubeletError(
                f"{name} holds {found} bytes, not {expected} (truncated?)", "Run `tubelet verify`, then copy it again"
            )
        clips = len(self.plan.shard_range(shard))
        with path.open("rb") as file:
            file.seek(clips * clip_bytes(self.plan, kind, of_hook))
            check_index(self.plan, kind, of_hook, shard, file.read(index_bytes(self.plan)), name)
        shape = (clips, *clip_shape(self.plan, kind, of_hook))
        return np.memmap(path, dtype=self.plan.numpy_dtype, mode="r", offset=0, shape=shape)


def open_store(url: str, allow_unfinished: bool = False) -> Store:
    """Open the store at `url` (a path or an fsspec URL).

    Args:
        url: Where the store lies.
        allow_unfinished: Also open a store that is still being written; only its committed shards are seen.

    Raises:
        TubeletError: nothing is there, it is not a Tubelet store, or it is unfinished.
    """
    root = open_root(url)
    state = read_state(root)
    if state is None:
        raise TubeletError(f"No store at {url}", "Check the path; `tubelet extract` prints where it wrote")
    store = Store(root, state)
    if not state.complete and not allow_unfinished:
        done = len(store.committed)
        raise TubeletError(
            f"{url} is unfinished: {done} of {state.plan.shards} shards are committed",
            "Run the same `tubelet extract` again to finish it, or open it with allow_unfinished=True",
        )
    return store
