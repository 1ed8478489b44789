"""New stores from existing ones: part of a store, or several stores joined. The existing ones stay unchanged.

    clips chosen in each store ─▶ plan and clip table of the new store ─▶ its shards, one by one
        a whole old shard in the same place of its clips:   its objects are linked (same disk) or copied, unread
        anything else:                                      clip by clip through the shard writer, each clip checked

A complete store never changes. Adding videos therefore makes a new store, which shares full shards with the old one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tubelet.concurrency import in_parallel
from tubelet.errors import TubeletError, nearest
from tubelet_store.clip_table import PLANNED, clip_table_digest, outcomes_of
from tubelet_store.commit import (
    Commit,
    StoredObject,
    encode_commit_moments,
    read_commit,
    read_commit_moments,
    stored_moments,
)
from tubelet_store.finished_shard import FinishedShard
from tubelet_store.format import array_kinds
from tubelet_store.manifest import Manifest
from tubelet_store.object_keys import ACTIVATIONS, SPECIAL, shard_key
from tubelet_store.plan import Hook
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_store.transfer import fetch

# Fields of two plans that may differ when their stores are joined.
_MAY_DIFFER = ("clips", "clip_table", "clips_per_shard")


@dataclass(frozen=True)
class Part:
    """Clips of one store."""

    store: Store
    clips: NDArray[np.int64]
    """[K] Their numbers, ascending."""


def whole(store: Store) -> Part:
    """Every clip of `store`."""
    return Part(store, np.arange(store.plan.clips))


def choose_clips(
    store: Store,
    splits: Sequence[str] = (),
    labels: Sequence[str | int] = (),
    videos: Sequence[str] = (),
    first: int | None = None,
) -> Part:
    """The clips of `store` that meet every condition given.

    Args:
        store: A complete store.
        splits: Their split is one of these.
        labels: Their class name, or number, is one of these.
        videos: Their video id is one of these.
        first: The first clips that remain, at most this many.

    Raises:
        TubeletError: a value that no clip has, or no clip is left.
    """
    table = store.clips()
    keep = pa.array(np.ones(table.num_rows, dtype=bool))
    names = [str(label) for label in labels]
    for field, wanted, columns in (
        ("split", splits, ["split"]),
        ("label", names, ["label_name", "label"]),
        ("video", videos, ["video_id"]),
    ):
        if not wanted:
            continue
        texts = [table[column].cast(pa.string()) for column in columns]
        present = {value for text in texts for value in text.unique().to_pylist() if value is not None}
        for value in wanted:
            if value not in present:
                raise TubeletError(
                    f"No clip of {store.url} has {field} '{value}'", nearest(value, sorted(present)[:50])
                )
        among = [pc.is_in(text, value_set=pa.array(wanted, pa.string())) for text in texts]
        keep = pc.and_(keep, among[0] if len(among) == 1 else pc.or_(*among))
    clips = np.flatnonzero(np.asarray(keep))[:first]
    if len(clips) == 0:
        raise TubeletError(f"No clip of {store.url} meets all the conditions", "Ask for less at once")
    return Part(store, clips)


class Composition:
    """A new store at `url` from `parts`, begun or continued.

    Args:
        url: Where to write it.
        parts: Its clips, part after part.
        hooks: The hooks it holds, in this order; None: all.
        clips_per_shard: Default: the first part's.

    Raises:
        TubeletError: a part is unfinished, the plans differ in more than their clips, a clip comes twice, no such
            hook, or `url` holds something else.
    """

    def __init__(
        self, url: str, parts: Sequence[Part], hooks: Sequence[str] | None = None, clips_per_shard: int | None = None
    ) -> None:
        self._parts = parts
        first = parts[0].store.plan
        for part in parts:
            if not part.store.complete:
                raise TubeletError(f"{part.store.url} is unfinished", "Finish its extraction first")
            _check_same(parts[0].store, part.store)
        table = _joined_table(parts)
        self.plan = first.model_copy(
            update={
                "clips": table.num_rows,
                "clip_table": clip_table_digest(table),
                "clips_per_shard": clips_per_shard or first.clips_per_shard,
                "hooks": tuple(first.hook(name) for name in hooks) if hooks else first.hooks,
            }
        )
        # [clips of the new store] which part each comes from, and its number there
        self._part_of = np.repeat(np.arange(len(parts)), [len(part.clips) for part in parts])
        self._clip_of = np.concatenate([part.clips for part in parts])
        self._manifests = [part.store.manifest() for part in parts]
        self._outcomes = [outcomes_of(part.store.clips()) for part in parts]
        provenance = {"parents": [{"identity": p.store.identity, "clips": len(p.clips)} for p in parts]}
        self._writer = StoreWriter.begin(url, self.plan, table, provenance)

    def run(self, threads: int = 4) -> Iterator[bool]:
        """Write the shards that are missing, then finish; yields per shard whether it was reused as it is.

        Raises:
            TubeletError: a clip is damaged in its store.
        """
        for _, reused in in_parallel(self._shard, self._writer.pending(), threads):
            yield reused
        self._writer.finish()

    def store(self) -> Store:
        """The finished store."""
        return open_store(self._writer.url)

    def _shard(self, shard: int) -> bool:
        rows = self.plan.shard_range(shard)
        number, clips = self._part_of[rows.start : rows.stop], self._clip_of[rows.start : rows.stop]
        source = self._parts[int(number[0])].store
        if (number == number[0]).all() and (old := self._same_shard(source, clips)) is not None:
            commit = read_commit(source.root, old)
            if commit is not None:
                self._reuse(shard, source, commit)
                return True
        readers: dict[int, _ClipReader] = {}
        with self._writer.shard(shard) as writer:
            for part, clip in zip(number.tolist(), clips.tolist(), strict=True):
                store = self._parts[part].store
                if part not in readers:
                    readers[part] = _ClipReader(store, self._manifests[part], self.plan.hooks)
                outcome = self._outcomes[part][clip]
                if outcome.status == "failed":
                    writer.append(outcome)
                    continue
                arrays = readers[part].read(clip)
                writer.append(outcome, arrays[ACTIVATIONS], arrays.get(SPECIAL))
            writer.commit()
        return False

    def _same_shard(self, source: Store, clips: NDArray[np.int64]) -> int | None:
        """The shard of `source` that holds exactly `clips`, in an object of the same bytes."""
        if source.plan.clips_per_shard != self.plan.clips_per_shard:
            return None
        shard = int(clips[0]) // source.plan.clips_per_shard
        return shard if np.array_equal(clips, np.asarray(source.plan.shard_range(shard))) else None

    def _reuse(self, shard: int, source: Store, commit: Commit) -> None:
        renamed = {
            shard_key(kind, hook.name, commit.shard): shard_key(kind, hook.name, shard)
            for kind in array_kinds(self.plan)
            for hook in self.plan.hooks
        }
        taken = [stored for stored in commit.objects if stored.key in renamed]
        of_source = read_commit_moments(source.root, commit)
        moments = encode_commit_moments({hook.name: of_source[hook.name] for hook in self.plan.hooks})
        with self._writer.scratch() as folder, contextlib.ExitStack() as fetched:
            files = {}
            for number, stored in enumerate(taken):
                key, path = renamed[stored.key], folder / str(number)
                files[key] = path
                lies_at = source.root.local_path(stored.key)
                try:
                    if lies_at is not None:
                        os.link(lies_at, path)
                        continue
                except OSError:
                    # On another disk, or the file system has no hard links.
                    pass
                path.mkdir()
                files[key] = fetched.enter_context(fetch(source.root, stored, path))
            record = commit.model_copy(
                update={
                    "plan": self.plan.digest,
                    "shard": shard,
                    "objects": tuple(s.model_copy(update={"key": renamed[s.key]}) for s in taken),
                    "moments": stored_moments(shard, moments),
                }
            )
            self._writer.publish(FinishedShard(record, moments, files))


def next_version(url: str) -> str:
    """Where the next version of the store at `url` goes: s.zarr -> s.v2.zarr -> s.v3.zarr."""
    stem, suffix = (url[:-5], ".zarr") if url.endswith(".zarr") else (url.rstrip("/"), "")
    name, dot, version = stem.rpartition(".v")
    if dot and version.isdecimal():
        return f"{name}.v{int(version) + 1}{suffix}"
    return f"{stem}.v2{suffix}"


def _check_same(first: Store, other: Store) -> None:
    differences = [
        line
        for line in first.plan.differences(other.plan)
        if line.partition(":")[0].partition(".")[0] not in _MAY_DIFFER
    ]
    if differences:
        raise TubeletError(
            f"{first.url} and {other.url} were made differently ({'; '.join(differences)})",
            "Only stores whose plans are equal but for their clips can be joined",
        )


def _joined_table(parts: Sequence[Part]) -> pa.Table:
    tables = [part.store.clips().select(PLANNED.names).take(pa.array(part.clips)) for part in parts]
    table = pa.concat_tables(tables)
    table = table.set_column(0, PLANNED.field("clip"), pa.array(np.arange(table.num_rows)))
    seen: dict[tuple[str, str, int], int] = {}
    rows = zip(*(table[name].to_pylist() for name in ("video_id", "uri", "view")), strict=True)
    for clip, row in enumerate(rows):
        if row in seen:
            raise TubeletError(
                f"View {row[2]} of video {row[0]} comes twice (clips {seen[row]} and {clip})",
                "Leave one of them out: `tubelet copy` part of a store first",
            )
        seen[row] = clip
    return table.cast(PLANNED)


class _ClipReader:
    """Reads clips of a store, each checked against its checksum. Shards of a remote store come through the cache."""

    def __init__(self, store: Store, manifest: Manifest, hooks: Sequence[Hook]) -> None:
        self._store, self._manifest, self._hooks = store, manifest, hooks
        self._shard = -1
        self._maps: dict[tuple[str, str], tuple[NDArray[Any], StoredObject]] = {}

    def read(self, clip: int) -> dict[str, dict[str, NDArray[Any]]]:
        """Per kind and hook, the values of `clip`.

        Raises:
            TubeletError: its bytes are not what was written.
        """
        plan = self._store.plan
        shard = clip // plan.clips_per_shard
        if shard != self._shard:
            self._open(shard)
        row = clip - plan.shard_range(shard).start
        arrays: dict[str, dict[str, NDArray[Any]]] = {kind: {} for kind in array_kinds(plan)}
        for (kind, hook), (mapped, stored) in self._maps.items():
            values = mapped[row]
            if int(google_crc32c.value(values.tobytes())) != stored.crc32c[row]:
                raise TubeletError(
                    f"{self._store.url}/{stored.key}: clip {clip} is damaged",
                    "Run `tubelet verify` on that store; repair it with --from ANOTHER_COPY",
                )
            arrays[kind][hook] = values
        return arrays

    def _open(self, shard: int) -> None:
        self._maps = {}
        self._shard = shard
        for kind in array_kinds(self._store.plan):
            for hook in self._hooks:
                mapped = self._store.shard_map(hook.name, shard, kind)
                stored = self._manifest.get(shard_key(kind, hook.name, shard))
                if stored is None:
                    raise TubeletError(
                        f"The manifest of {self._store.url} lacks shard {shard} of {hook.name}",
                        "Copy the store again from its source",
                    )
                self._maps[kind, hook.name] = (mapped, stored)
