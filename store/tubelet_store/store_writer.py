"""A store being written: begun by one driver, filled by many workers, finished once.

    begin (plan, clip table) ─▶ shard writers, anywhere, any order ─▶ finish: merge the records, set `complete` last

Resuming is the same call: the shards that have a record are done, the others are pending.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tubelet.concurrency import in_parallel
from tubelet.errors import StoreUnreachable, TubeletError
from tubelet_store.clip_table import (
    PLANNED,
    ClipOutcome,
    check_planned,
    completed,
    finished_table,
    from_parquet,
    to_parquet,
)
from tubelet_store.commit import (
    Commit,
    StoredObject,
    committed_shards,
    read_commit,
    read_commit_moments,
)
from tubelet_store.finished_shard import FinishedShard, publish
from tubelet_store.format import metadata_documents, moments_documents
from tubelet_store.manifest import ManifestRows
from tubelet_store.moments import Moments
from tubelet_store.object_keys import CLIPS, GROUP, MANIFEST, PLAN_TABLE
from tubelet_store.plan import Plan
from tubelet_store.shard_writer import ShardWriter
from tubelet_store.spool import Spool
from tubelet_store.storage import open_root
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.store_state import StoreState, read_state, state_document

# Each record is a request on object storage, and a large store has 100,000 records.
_READERS = 16
# Moments of a shard may take 100 MB, and each reader holds a few.
_MOMENTS_READERS = 2
_SPOOL_FULL_PAUSE_S = 5.0


class StoreWriter:
    """The store at `root` while it is written. Get one from `begin` (driver) or `attach` (worker)."""

    def __init__(self, root: ObjectRoot, state: StoreState) -> None:
        self._root = root
        self.state = state
        self.plan = state.plan
        self.url = root.url

    @classmethod
    def begin(cls, url: str, plan: Plan, clips: pa.Table, provenance: Mapping[str, Any]) -> StoreWriter:
        """Create the store, or continue it if it was begun with the same plan.

        Args:
            url: A path or fsspec URL.
            plan: What the store will hold.
            clips: Clip table with the planned columns, `plan.clips` rows.
            provenance: What describes this run but decides no byte (data set root, software, time): kept, not hashed.

        Raises:
            TubeletError: `url` holds something else, or a store with another plan (the differences are listed).
        """
        root = open_root(url)
        table = check_planned(clips)
        if table.num_rows != plan.clips:
            raise ValueError(f"plan of {plan.clips} clips, table of {table.num_rows}")
        state = read_state(root)
        if state is None:
            documents = metadata_documents(plan, {})
            # A killed `begin` of the same plan leaves some of these; any other object belongs to another program.
            if set(root.list_keys()) - {PLAN_TABLE, *documents}:
                raise TubeletError(
                    f"{url} is not empty and not a Tubelet store", "Choose a new path, or empty this one"
                )
            state = StoreState(plan=plan, plan_digest=plan.digest, provenance=dict(provenance))
            documents[GROUP] = state_document(state)
            root.replace(PLAN_TABLE, to_parquet(table))
            # The group document comes last: if it exists, the store was begun.
            for key in sorted(documents, key=lambda key: key == GROUP):
                root.replace(key, documents[key])
        elif state.plan_digest != plan.digest:
            differences = "; ".join(state.plan.differences(plan))
            raise TubeletError(
                f"{url} was begun with another plan ({differences})",
                "Give the earlier settings to continue it, or another store path to start over",
            )
        if not state.complete:
            root.probe_create()
        return cls(root, state)

    @classmethod
    def attach(cls, url: str, plan_digest: str) -> StoreWriter:
        """The begun store at `url`, for a worker that expects a given plan.

        Raises:
            TubeletError: there is none, or its plan is another.
        """
        root = open_root(url)
        state = read_state(root)
        if state is None or state.plan_digest != plan_digest:
            raise TubeletError(
                f"This worker does not see the store {url} that the job began",
                "Use a path that every machine of the cluster shares, or an s3:// URL",
            )
        return cls(root, state)

    def planned_clips(self) -> pa.Table:
        """The clip table as planned."""
        return completed(from_parquet(self._root.read(PLAN_TABLE)), PLANNED)

    def pending(self) -> list[int]:
        """Shards without a record, ascending."""
        done = set(committed_shards(self._root))
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def committed(self, shard: int) -> Commit | None:
        """The commit record of `shard`, None while it is pending."""
        return read_commit(self._root, shard)

    def commits(self, shards: Iterable[int]) -> Iterator[Commit]:
        """The commit records of `shards`, in order.

        Raises:
            TubeletError: one of them is not committed.
        """
        return (commit for _, commit in in_parallel(self._commit, shards, _READERS))

    def shard(self, shard: int) -> ShardWriter:
        """A writer for the whole of shard `shard`."""
        return ShardWriter(self._root, self.plan, shard)

    def publish(self, finished: FinishedShard, spool: Spool | None = None) -> Commit | None:
        """Publish a shard that a writer finished; see `finished_shard.publish`.

        Args:
            finished: The shard.
            spool: Keeps the shard on this machine while object storage is unreachable. A full spool is waited for.

        Returns:
            The record that counts; None if the shard waits in `spool`.

        Raises:
            StoreUnreachable: object storage does not answer and there is no spool.
            TubeletError: the same, and the spool stayed full for `upload.patience_s`.
        """
        deadline = time.monotonic() + (spool.patience_s if spool is not None else 0.0)
        while True:
            try:
                return publish(self._root, self.plan, finished)
            except StoreUnreachable as error:
                if spool is None:
                    raise
                if spool.keep(finished):
                    return None
                if time.monotonic() > deadline:
                    raise TubeletError(
                        f"{self.url} has not answered for {spool.patience_s:g} s, and the spool {spool.directory} is "
                        f"full: {error.problem}",
                        "Fix the connection and run the same command again; upload.spool_mb makes more room",
                    ) from error
            # Workers that failed together must not retry together.
            time.sleep(_SPOOL_FULL_PAUSE_S * random.uniform(0.5, 1.0))

    def drain(self, spool: Spool) -> list[int]:
        """Upload shards from `spool` while the storage is reachable; returns the shards committed now."""
        return spool.drain(self._root)

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A fresh local directory for unfinished files, removed on leaving."""
        return self._root.scratch()

    def discard_scratch(self) -> None:
        """Remove scratch files of killed writers; running writers keep theirs."""
        self._root.discard_scratch()

    def free_bytes(self) -> int | None:
        """Free space at the store's location, None if unknown."""
        return self._root.free_bytes()

    def finish(self) -> StoreState:
        """Merge the records in shard order into clip table, moments and manifest; set the store complete, last.

        Calling it again gives the same bytes.

        Raises:
            TubeletError: a shard has no record, a recorded object is missing or of another size, or the moments of a
                shard are damaged.
        """
        if self.state.complete:
            self._root.discard_scratch()
            return self.state
        shards = range(self.plan.shards)
        rows = ManifestRows()
        failed = 0

        def outcomes() -> Iterator[ClipOutcome]:
            nonlocal failed
            for _, commit in in_parallel(self._sound_commit, shards, _READERS):
                rows.add(commit.objects)
                failed += sum(outcome.status == "failed" for outcome in commit.clips)
                yield from commit.clips

        table = finished_table(self.planned_clips(), outcomes(), self.plan.clips_per_shard)
        documents = {CLIPS: to_parquet(table), **moments_documents(self._merged_moments())}
        for key, data in documents.items():
            self._root.replace(key, data)
        for key in metadata_documents(self.plan, {}):
            if key != GROUP:
                documents[key] = self._root.read(key)
        rows.add(StoredObject.of(key, data) for key, data in documents.items())
        manifest = rows.manifest(self.plan)
        self._root.replace(MANIFEST, manifest.to_parquet())
        self.state = self.state.model_copy(
            update={
                "state": "complete",
                "identity": manifest.identity,
                "clips_failed": failed,
            }
        )
        self._root.replace(GROUP, state_document(self.state))
        self._root.discard_scratch()
        return self.state

    def _commit(self, shard: int) -> Commit:
        commit = read_commit(self._root, shard)
        if commit is None:
            raise TubeletError(
                f"{self._root.url}: shard {shard} of {self.plan.shards} is not committed", "Run the extraction again"
            )
        return commit

    def _sound_commit(self, shard: int) -> Commit:
        commit = self._commit(shard)
        for stored in commit.objects:
            if self._root.size(stored.key) != stored.size_bytes:
                raise TubeletError(
                    f"{stored.key} of {self._root.url} is missing or not {stored.size_bytes} bytes long",
                    "Delete the commit record of its shard and run the extraction again",
                )
        return commit

    def _merged_moments(self) -> dict[str, Moments]:
        merged = {hook.name: Moments.empty(hook.channels) for hook in self.plan.hooks}

        def read(shard: int) -> dict[str, Moments]:
            return read_commit_moments(self._root, self._commit(shard))

        for _, of_shard in in_parallel(read, range(self.plan.shards), _MOMENTS_READERS):
            for hook, moments in of_shard.items():
                merged[hook] = merged[hook].merge(moments)
        return merged
