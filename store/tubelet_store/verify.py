"""Verification of every byte of a store: objects against the manifest, clips against their checksums.

    every object ─▶ size, digest, checksum of each clip ─▶ findings ─▶ (given another copy) repair

The identity covers sizes and digests. The checksums per clip, which only locate the damage, are recomputed
from the objects, so a manifest in which they were changed is found too.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tubelet.concurrency import in_parallel
from tubelet.errors import TubeletError
from tubelet.paths import cache_folder
from tubelet_store.commit import StoredObject
from tubelet_store.digest import digest_of
from tubelet_store.format import array_kinds, clip_bytes
from tubelet_store.object_keys import MANIFEST, shard_key
from tubelet_store.reader import Store
from tubelet_store.transfer import transfer


@dataclass(frozen=True)
class Finding:
    """One fault."""

    key: str
    """Object it concerns."""
    problem: str
    clips: tuple[int, ...] = ()
    """Clips whose bytes are damaged, where that is known."""


def verify(
    store: Store, threads: int = 4, skip: Callable[[StoredObject], bool] = lambda _: False
) -> Iterator[tuple[StoredObject, list[Finding]]]:
    """Check every object of `store`, reading each byte once; yields objects with their findings as they are done.

    Of a complete store every object of the manifest is checked, of an unfinished one every committed shard. Memory is
    bounded: objects are read in pieces.

    Args:
        store: The store.
        threads: Objects checked at once.
        skip: Objects that need no reading (an interrupted run found them good).

    Raises:
        TubeletError: the manifest itself is missing, damaged or not the store's.
    """
    checks = _ObjectCheck(store)
    yield from in_parallel(lambda stored: [] if skip(stored) else checks(stored), expected_objects(store), threads)


def expected_objects(store: Store) -> Sequence[StoredObject]:
    """What the manifest, or the commit records of an unfinished store, say should be there."""
    if store.complete:
        return store.manifest()
    commits = [store.commit_record(shard) for shard in store.committed]
    return [stored for commit in commits for stored in (*commit.objects, commit.moments)]


class VerifiedObjects:
    """Objects that an interrupted `verify` has verified, kept in the user's cache: the next run continues there.

    Args:
        store: The store that is verified.
        fresh: Forget what an earlier run found.
    """

    def __init__(self, store: Store, fresh: bool = False) -> None:
        cache = cache_folder("verify")
        name = hashlib.sha256(f"{store.url} {store.identity}".encode()).hexdigest()[:32]
        self._path = cache / f"{name}.txt"
        if fresh:
            self._path.unlink(missing_ok=True)
        self._verified: frozenset[str] = frozenset()
        self.age_s = 0.0
        """How long ago the interrupted run stopped."""
        if self._path.exists():
            self.age_s = time.time() - self._path.stat().st_mtime
            # The last line may be cut off; no object is called by a part of a digest.
            self._verified = frozenset(self._path.read_text().split())
        cache.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")

    def __len__(self) -> int:
        return len(self._verified)

    def __contains__(self, stored: StoredObject) -> bool:
        """An interrupted run has verified it."""
        return self._line(stored) in self._verified

    def add(self, stored: StoredObject) -> None:
        """Remember it."""
        self._file.write(self._line(stored) + "\n")
        self._file.flush()

    def clear(self) -> None:
        """Forget them: the run is complete."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _line(self, stored: StoredObject) -> str:
        return hashlib.sha256(f"{stored.key} {stored.sha256}".encode()).hexdigest()


class Repair:
    """Replaces damaged objects of `store` by those of another copy, each verified before it takes its place.

    Raises:
        TubeletError: `source` is another store.
    """

    def __init__(self, store: Store, source: Store) -> None:
        if not store.complete or source.identity != store.identity:
            raise TubeletError(
                f"{source.url} is not a copy of {store.url}: its identity is {source.identity}, not {store.identity}",
                "Name a copy of the same store with --from",
            )
        self._root, self._source = store.root, source

    def manifest(self) -> None:
        """Replace the manifest by the source's."""
        self._root.replace(MANIFEST, self._source.manifest().to_parquet())

    def replace(self, finding: Finding, stored: StoredObject) -> None:
        """Replace what `finding` about `stored` says is damaged.

        Raises:
            TubeletError: the source's is damaged too.
        """
        if finding.key == MANIFEST:
            self.manifest()
        else:
            transfer(self._source.root, self._root, stored)


class _ObjectCheck:
    """Checks one object, and finds the clips that a fault affects."""

    def __init__(self, store: Store) -> None:
        self._store = store
        plan = store.plan
        self._clip_layout = {
            shard_key(kind, hook.name, shard): (clip_bytes(plan, kind, hook), plan.shard_range(shard))
            for kind in array_kinds(plan)
            for hook in plan.hooks
            for shard in store.committed
        }
        self._videos: dict[int, str] = {}
        # Where the clip table is damaged it is a finding like any other, and clips are named by number alone.
        with contextlib.suppress(TubeletError):
            table = store.clips()
            self._videos = dict(zip(table["clip"].to_pylist(), table["video_id"].to_pylist(), strict=True))

    def __call__(self, stored: StoredObject) -> list[Finding]:
        root = self._store.root
        size = root.size(stored.key)
        if size is None:
            return [Finding(stored.key, "missing")]
        if size != stored.size_bytes:
            return [Finding(stored.key, f"{size} bytes instead of {stored.size_bytes}")]
        size_of_clip, clips = self._clip_layout.get(stored.key, (0, range(0)))
        digest = digest_of(root.chunks(stored.key), len(clips), size_of_clip)
        damaged = [
            clip
            for clip, computed, recorded in zip(clips, digest.crc32c, stored.crc32c, strict=False)
            if computed != recorded
        ]
        if digest.sha256 == stored.sha256:
            if digest.crc32c == stored.crc32c:
                return []
            where = MANIFEST if self._store.complete else "the commit record"
            return [Finding(MANIFEST, f"the clip checksums of {stored.key} in {where} are not those of its bytes")]
        if not damaged:
            return [Finding(stored.key, "its digest differs (outside the clips' bytes)")]
        names = ", ".join(f"clip {clip} (video {self._videos.get(clip, '?')})" for clip in damaged)
        return [Finding(stored.key, f"damaged: {names}", tuple(damaged))]
