"""Readable stores: plan, clip table, moments, and shards as read-only memory maps.

open_store(url) ─▶ Store ─▶ shard_map(hook, i): the file itself, as an array [clip, time, space, channel]
                                                 (of a remote store: its file in the local cache)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tubelet.errors import StoreUnreachable, TubeletError
from tubelet.formats import human_bytes
from tubelet.tables import Table, Tabular
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.cache.shard_object import ShardObject
from tubelet_store.catalog.catalog import is_reference, resolve
from tubelet_store.clip_table import FINISHED, completed, finished_table, from_parquet
from tubelet_store.commit import Commit, committed_shards, read_commit, read_commit_moments
from tubelet_store.format import (
    array_kinds,
    check_index,
    clip_bytes,
    clip_shape,
    encode_index,
    index_bytes,
    read_moments,
    shard_bytes,
)
from tubelet_store.hook_array import HookArray
from tubelet_store.manifest import Manifest
from tubelet_store.moments import Moments
from tubelet_store.object_keys import ACTIVATIONS, CLIPS, GROUP, MANIFEST, MOMENTS, PLAN_TABLE, SPECIAL, shard_key
from tubelet_store.plan import Hook, Plan
from tubelet_store.storage import open_root
from tubelet_store.storage.client import NoAccess
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.store_state import StoreState, read_state, readings

T = TypeVar("T")

# Errors of Arrow, zarr, pydantic and NumPy on damaged bytes.
_DAMAGE = (pa.ArrowException, LookupError, NotImplementedError, OSError, TypeError, ValueError)


class Store(Tabular):
    """A readable store. Everything it gives is read-only.

    store.hooks                    ("blocks.3", "blocks.6")
    len(store), store.shape(hook)  clips; (clips, time, space, channels)
    store["blocks.3"]              lazy array [clip, time, space, channel]
    """

    def __init__(self, root: ObjectRoot, state: StoreState, cache: CacheConfig | None = None) -> None:
        self.root = root
        self.cache = LocalCache(root.url, cache) if root.local_path(GROUP) is None else None
        """Keeps shards of a remote store on a local disk; None: the store is local."""
        if self.cache is not None:
            sizes = [shard_bytes(state.plan, ACTIVATIONS, hook, 0) for hook in state.plan.hooks]
            self.cache.check_budget(min(sizes), max(sizes))
        self.state = state
        self.plan: Plan = state.plan
        self.url: str = root.url

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (self.url,))

    @property
    def size_bytes(self) -> int:
        """Bytes of the committed shards."""
        kinds, hooks = array_kinds(self.plan), self.plan.hooks
        return sum(shard_bytes(self.plan, kind, hook, i) for i in self.committed for kind in kinds for hook in hooks)

    def table(self) -> Table:
        """What the store holds, as a notebook shows it."""
        plan, grid = self.plan, self.plan.grid
        failed = self.state.clips_failed if self.complete else None
        rows = [
            ("state", f"{self.state.state}, {len(self.committed):,} of {plan.shards:,} shards"),
            ("clips", f"{plan.clips:,}" if failed is None else f"{plan.clips:,}, {failed:,} of them failed"),
            *((f"hook {hook.name}", f"{hook.channels:,} channels") for hook in plan.hooks),
            ("grid", f"{grid.time} time x {grid.height} height x {grid.width} width"),
            ("dtype", plan.dtype),
            ("size", human_bytes(self.size_bytes)),
            ("data set", ", ".join(f"{k} {v}" for k, v in plan.dataset.items() if v is not None)),
            ("backbone", ", ".join(f"{k} {v}" for k, v in plan.backbone.items() if isinstance(v, str))),
            ("identity", self.identity),
        ]
        return Table.of_rows(("store", "value"), rows, title=self.url)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks, in the plan's order."""
        return tuple(hook.name for hook in self.plan.hooks)

    def __len__(self) -> int:
        """Number of clips, failed ones included."""
        return self.plan.clips

    def __iter__(self) -> Iterator[str]:
        """The names of the hooks; without it Python would iterate by `store[0]`, `store[1]`, ..."""
        return iter(self.hooks)

    def shape(self, hook: str) -> tuple[int, int, int, int]:
        """(clips, time, space, channels) of the activations at `hook`.

        Raises:
            TubeletError: the store has no such hook.
        """
        return self[hook].shape

    def __getitem__(self, hook: str) -> HookArray:
        """The activations of all clips at `hook`, as a lazy read-only array [clip, time, space, channel].

        Raises:
            TubeletError: the store has no such hook.
        """
        return HookArray(self, hook)

    def special_tokens(self, hook: str) -> HookArray:
        """The special tokens of all clips at `hook`, as a lazy read-only array [clip, time or 1, token, channel].

        Raises:
            TubeletError: the store has no such hook, or no special tokens.
        """
        return HookArray(self, hook, SPECIAL)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.hooks)

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
        if self.complete:
            return tuple(range(self.plan.shards))
        return tuple(shard for shard in committed_shards(self.root) if shard < self.plan.shards)

    @cached_property
    def _table(self) -> pa.Table:
        if self.complete:
            return self._parsed(CLIPS, self._finished_table)
        planned = from_parquet(self.root.read(PLAN_TABLE))
        rows = [clip for shard in self.committed for clip in self.plan.shard_range(shard)]
        outcomes = [outcome for shard in self.committed for outcome in self.commit_record(shard).clips]
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

    @cached_property
    def kept_patches(self) -> NDArray[np.int32] | None:
        """[plan.clips, space] Patches of `plan.position_grid` that are stored, row-major numbers, ascending per clip.

        None: every clip holds the whole grid. Clips that hold no activations have -1.
        """
        if self.plan.position_grid == self.plan.grid:
            return None
        kept = np.full((self.plan.clips, self.plan.grid.space), -1, dtype=np.int32)
        table = self.clips()
        for clip, patches in zip(table["clip"].to_pylist(), table["patches"].to_pylist(), strict=True):
            if patches is not None:
                kept[clip] = patches
        return kept

    def patch_positions(self, clip: int) -> NDArray[np.int64]:
        """[space, 2] Row and column, in `plan.position_grid`, of each entry of axis `space` of `clip`.

        Raises:
            TubeletError: there is no such clip, or its places are not recorded because it failed.
        """
        if not 0 <= clip < self.plan.clips:
            raise TubeletError(f"{self.url} has no clip {clip}", f"Its clips are 0 to {self.plan.clips - 1}")
        patches = np.arange(self.plan.grid.space) if self.kept_patches is None else self.kept_patches[clip]
        if patches[0] < 0:
            raise TubeletError(f"{self.url}: clip {clip} holds no activations", "See its error in the clip table")
        return np.stack(np.divmod(patches.astype(np.int64), self.plan.position_grid.width), axis=1)

    def _finished_table(self, data: bytes) -> pa.Table:
        table = from_parquet(data)
        if table.num_rows != self.plan.clips:
            raise ValueError(f"{table.num_rows} rows for {self.plan.clips} clips")
        return completed(table, FINISHED)

    def _parsed(self, key: str, parse: Callable[[bytes], T]) -> T:
        try:
            data = self._read(key)
        except FileNotFoundError as error:
            raise TubeletError(f"{self.url}/{key} is missing", "Copy the store again from its source") from error
        try:
            return parse(data)
        except _DAMAGE as error:
            raise self._damaged(key, error) from error

    def _read(self, key: str) -> bytes:
        """A small object; what comes over a network is checked against the manifest."""
        if self.cache is None or not self.complete or key == MANIFEST:
            return self.root.read(key)
        stored = self._manifest.get(key)
        for _ in range(readings(self.root)):
            data = self.root.read(key)
            if stored is not None and hashlib.sha256(data).hexdigest() == stored.sha256:
                return data
        raise self._damaged(key, ValueError("its digest is not the manifest's"))

    def _damaged(self, key: str, error: Exception) -> TubeletError:
        detail = " ".join(str(error).split())
        return TubeletError(f"{self.url}/{key} is damaged: {detail}", "Copy it again from the store's source")

    def shard_range(self, shard: int) -> range:
        """Clip numbers in `shard`."""
        return self.plan.shard_range(shard)

    def commit_record(self, shard: int) -> Commit:
        """The commit record of `shard`.

        Raises:
            TubeletError: the shard is not committed.
        """
        commit = read_commit(self.root, shard)
        if commit is None:
            raise self._not_committed(shard)
        return commit

    def manifest(self) -> Manifest:
        """The manifest of a complete store.

        Raises:
            TubeletError: it is missing, or its identity is not the store's.
        """
        for reading in range(readings(self.root), 0, -1):
            try:
                return self._read_manifest()
            except (StoreUnreachable, NoAccess):
                raise
            except TubeletError:
                if reading == 1:
                    raise
        raise AssertionError("the last reading returns or raises")

    @cached_property
    def _manifest(self) -> Manifest:
        return self.manifest()

    def _read_manifest(self) -> Manifest:
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
            documents = {key: self._read(key) for key in self.root.list_keys(folder)}
            try:
                return read_moments(documents, hook)
            except _DAMAGE as error:
                raise self._damaged(folder, error) from error
        merged = Moments.empty(self.plan.hook(hook).channels)
        for shard in self.committed:
            merged = merged.merge(read_commit_moments(self.root, self.commit_record(shard))[hook])
        return merged

    def shard_map(self, hook: str, shard: int, kind: str = ACTIVATIONS, private: bool = False) -> NDArray[Any]:
        """Shard `shard` at `hook` as a read-only memory map [clip, time, space, channel] in the store's dtype.

        Args:
            hook: Name of the hook.
            shard: Number of the shard.
            kind: `activations`, or `special_tokens` ([clip, time or 1, token, channel]).
            private: Give a map that may be written to: changes stay in this map (copy on write).

        For a remote store this maps the cached file, which is fetched first and not evicted while the map is open.

        Raises:
            TubeletError: no such hook; the shard is not committed, missing, truncated or not in order, or it cannot be
                fetched.
        """
        of_hook, key = self.plan.hook(hook), shard_key(kind, hook, shard)
        path = self.root.local_path(key)
        if self.cache is not None:
            opened = self.cache.open(self.shard_object(hook, shard, kind))
        elif shard not in self.committed or path is None:
            raise self._not_committed(shard)
        else:
            try:
                opened = path.open("rb")
            except FileNotFoundError as error:
                remedy = "Run `tubelet verify`, then copy the store again"
                raise TubeletError(f"{self.url}/{key} is missing", remedy) from error
        with opened as file:
            return self._mapped(file, of_hook, shard, kind, private)

    def _mapped(self, file: BinaryIO, hook: Hook, shard: int, kind: str, private: bool) -> NDArray[Any]:
        name = f"{self.url}/{shard_key(kind, hook.name, shard)}"
        expected_bytes, size_bytes = shard_bytes(self.plan, kind, hook, shard), os.fstat(file.fileno()).st_size
        if size_bytes != expected_bytes:
            raise TubeletError(
                f"{name} has {size_bytes} bytes, not {expected_bytes} (truncated?)",
                "Run `tubelet verify`, then copy it again",
            )
        clips = len(self.plan.shard_range(shard))
        file.seek(clips * clip_bytes(self.plan, kind, hook))
        check_index(self.plan, kind, hook, shard, file.read(index_bytes(self.plan)), name)
        shape = (clips, *clip_shape(self.plan, kind, hook))
        return np.memmap(file, self.plan.numpy_dtype, "c" if private else "r", offset=0, shape=shape)

    def prefetch(self, hook: str, shards: Iterable[int]) -> None:
        """Fetch the next shards of a remote store in the background. Does nothing for a local store.

        Args:
            hook: Name of the hook.
            shards: Shards in the order of their first use, from now on; empty: none.
        """
        if self.cache is not None:
            self.cache.prefetch(self.shard_object(hook, shard) for shard in shards)

    def shard_object(self, hook: str, shard: int, kind: str = ACTIVATIONS) -> ShardObject:
        """Size and checksums of a shard, for the local cache.

        Raises:
            TubeletError: no such hook; the shard is not committed, or not in the manifest.
        """
        of_hook, key = self.plan.hook(hook), shard_key(kind, hook, shard)
        if shard not in self.committed:
            raise self._not_committed(shard)
        if self.complete:
            stored = self._manifest.get(key)
        else:
            stored = next((each for each in self.commit_record(shard).objects if each.key == key), None)
        clips = len(self.plan.shard_range(shard))
        size_bytes = shard_bytes(self.plan, kind, of_hook, shard)
        if stored is None or stored.size_bytes != size_bytes or len(stored.crc32c) != clips:
            raise TubeletError(
                f"{self.url}/{key}: the manifest does not describe the {size_bytes} bytes that the plan requires",
                "Copy the store again from its source",
            )
        return ShardObject(
            stored=stored,
            clip_bytes=clip_bytes(self.plan, kind, of_hook),
            first_clip=self.plan.shard_range(shard).start,
            tail=encode_index(self.plan, kind, of_hook, shard),
        )

    def _not_committed(self, shard: int) -> TubeletError:
        return TubeletError(f"{self.url}: shard {shard} is not committed", "Run the extraction again to finish it")


def _reopened(url: str) -> Store:
    return open_store(url, allow_unfinished=True)


def open_store(url: str, allow_unfinished: bool = False, cache: CacheConfig | None = None) -> Store:
    """Open the store at `url` (a path, an fsspec URL, or `catalog.yaml#name`).

    Args:
        url: Location of the store, or its name in a catalog (by path or URL), whose digest it must then have.
        allow_unfinished: Also open a store that is still being written; only its committed shards are seen.
        cache: Where and how much of a remote store is kept on a local disk; None: the defaults.

    Raises:
        TubeletError: nothing is there, it is not a Tubelet store, it is unfinished, or it is another one than the
            catalog means.
    """
    identity, remedy = None, "Check the path; `tubelet extract` prints where it wrote"
    if is_reference(url):
        entry = resolve(url)
        url, identity = entry.url, entry.identity
        remedy = f"Its description in the catalog: {entry.about.description or 'none'}"
    root = open_root(url)
    state = read_state(root)
    if state is None:
        raise TubeletError(f"No store at {url}", remedy)
    store = Store(root, state, cache)
    if identity is not None and store.identity != identity:
        raise TubeletError(
            f"{url} is not the store that the catalog means: its identity is {store.identity}, not {identity}",
            "If the store was rebuilt on purpose, `tubelet catalog add --replace` lists the new one",
        )
    if not state.complete and not allow_unfinished:
        done = len(store.committed)
        raise TubeletError(
            f"{url} is unfinished: {done} of {state.plan.shards} shards are committed",
            "Run the same `tubelet extract` again to finish it, or open it with allow_unfinished=True",
        )
    return store
