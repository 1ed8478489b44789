"""Is every byte of a store still what was written? Objects against the manifest, clips against their checksums."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c

from tubelet_store.commit import StoredObject
from tubelet_store.errors import TubeletError
from tubelet_store.layout import ACTIVATIONS, COMMITS, GROUP, MANIFEST, PLAN_TABLE, SPECIAL, array_kinds, clip_bytes
from tubelet_store.layout import shard_key as key_of_shard
from tubelet_store.reader import Store


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    key: str
    """Object it concerns."""
    problem: str
    clips: tuple[int, ...] = ()
    """Clips whose bytes are damaged, where that is known."""


def verify(store: Store, threads: int = 4) -> Iterator[tuple[StoredObject, list[Finding]]]:
    """Check every object of `store`, reading each byte once; yields objects with their findings as they are done.

    Of a complete store every object of the manifest is checked, of an unfinished one every committed shard.

    Raises:
        TubeletError: the manifest itself is missing, damaged or not the store's.
    """
    objects = expected_objects(store)
    checks = _ObjectCheck(store)
    with ThreadPoolExecutor(threads) as pool:
        yield from zip(objects, pool.map(checks, objects), strict=True)


def expected_objects(store: Store) -> list[StoredObject]:
    """What the manifest, or the commit records of an unfinished store, say should be there."""
    if store.complete:
        return list(store.manifest().objects)
    commits = [store.commit(shard) for shard in store.committed]
    return [stored for commit in commits for stored in (*commit.objects, commit.moments)]


def orphans(store: Store) -> list[str]:
    """Objects that belong to nothing: left by dead writers, or put there by somebody else."""
    known = {stored.key for stored in expected_objects(store)} | {GROUP, PLAN_TABLE, MANIFEST}
    return [key for key in store.root.list_keys() if key not in known and not key.startswith(f"{COMMITS}/")]


class _ObjectCheck:
    """Checks one object; knows which object holds which clips."""

    def __init__(self, store: Store) -> None:
        self._store = store
        plan = store.plan
        self._clip_layout = {
            key_of_shard(kind, hook.name, shard): (clip_bytes(plan, kind, hook), plan.shard_range(shard))
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
        found = self._store.root.size(stored.key)
        if found is None:
            return [Finding(stored.key, "missing")]
        if found != stored.size_bytes:
            return [Finding(stored.key, f"{found} bytes instead of {stored.size_bytes}")]
        data = self._store.root.read(stored.key)
        if hashlib.sha256(data).hexdigest() == stored.sha256:
            return []
        damaged = self._damaged_clips(stored, data)
        if not damaged:
            return [Finding(stored.key, "its digest differs (outside the clips' bytes)")]
        names = ", ".join(f"clip {clip} (video {self._videos.get(clip, '?')})" for clip in damaged)
        return [Finding(stored.key, f"damaged: {names}", tuple(damaged))]

    def _damaged_clips(self, stored: StoredObject, data: bytes) -> list[int]:
        if not stored.key.startswith((f"{ACTIVATIONS}/", f"{SPECIAL}/")) or not stored.crc32c:
            return []
        size, clips = self._clip_layout[stored.key]
        return [
            clip
            for number, (clip, checksum) in enumerate(zip(clips, stored.crc32c, strict=True))
            if int(google_crc32c.value(data[number * size : (number + 1) * size])) != checksum
        ]
