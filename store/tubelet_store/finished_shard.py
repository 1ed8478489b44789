"""A computed shard in local files, and its publication, now or once the object storage is reachable again.

    objects ─▶ moments ─▶ commit record (create-only, last)

Local roots lock the shard and replace objects of a killed writer. Object storage has no locks, so an object is written
once and never replaced: a writer that finds other bytes of the same shard adopts them. The record therefore always
describes the objects that are there, however many writers there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tubelet.errors import TubeletError
from tubelet_store.commit import (
    Commit,
    StoredObject,
    decode_commit_moments,
    encode_commit_moments,
    read_commit,
    stored_moments,
    write_commit,
)
from tubelet_store.digest import digest_of
from tubelet_store.format import array_kinds, clip_bytes, clip_shape, encode_index
from tubelet_store.moments import Moments
from tubelet_store.object_keys import ACTIVATIONS, commit_key, commit_moments_key, shard_key
from tubelet_store.plan import Plan
from tubelet_store.storage.object_root import ObjectRoot


@dataclass(frozen=True)
class FinishedShard:
    """Everything there is to publish of one shard."""

    commit: Commit
    """The record, if this writer's objects are published."""
    moments: bytes
    files: Mapping[str, Path]
    """Local file of each object, by key."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the objects."""
        return sum(stored.size_bytes for stored in self.commit.objects)


def publish(root: ObjectRoot, plan: Plan, finished: FinishedShard) -> Commit:
    """Publish the objects, then the record. Publishing again after a failure resumes.

    Returns:
        The record that counts: this one, or that of another writer of the same shard who was first.

    Raises:
        TubeletError: the objects of another writer are there, with other failed clips.
        StoreUnreachable: the object storage is unreachable.
    """
    shard = finished.commit.shard
    # A scheduler may run the same shard twice at once; where the root can lock, one of the two goes first.
    with root.exclusive(f"shard-{shard}"):
        if (earlier := read_commit(root, shard)) is not None:
            return earlier
        objects, moments = [], decode_commit_moments(finished.moments)
        for stored in finished.commit.objects:
            if root.deposit(stored.key, finished.files[stored.key], stored.sha256):
                objects.append(stored)
            else:
                objects.append(_adopt(root, plan, stored.key, finished.commit, moments))
        commit = finished.commit.model_copy(update={"objects": tuple(objects)})
        settled = finished.moments if commit.objects == finished.commit.objects else encode_commit_moments(moments)
        settled = root.settle(commit_moments_key(shard), settled)
        commit = commit.model_copy(update={"moments": stored_moments(shard, settled)})
        if write_commit(root, commit):
            return commit
    winner = read_commit(root, shard)
    if winner is None or winner.objects != commit.objects:
        raise TubeletError(
            f"Shard {shard} of {root.url} was written twice at once, with different bytes",
            f"Delete its commit record {commit_key(shard)} and run the extraction again",
        )
    return winner


def _adopt(root: ObjectRoot, plan: Plan, key: str, commit: Commit, moments: dict[str, Moments]) -> StoredObject:
    """Describe the object that another writer of the same shard wrote at `key`, and use its moments."""
    kind, hook = next(
        (kind, hook)
        for kind in array_kinds(plan)
        for hook in plan.hooks
        if shard_key(kind, hook.name, commit.shard) == key
    )
    data = root.read(key)
    size, clips = clip_bytes(plan, kind, hook), len(commit.clips)
    rows = [np.frombuffer(data[i * size : (i + 1) * size], np.uint8) for i in range(clips)]
    sound = len(data) == clips * size + len(tail := encode_index(plan, kind, hook, commit.shard))
    sound = sound and data[clips * size :] == tail
    values = [row.view(plan.numpy_dtype).reshape(clip_shape(plan, kind, hook)) for row in rows] if sound else []
    failed = [bool(np.isnan(clip.astype(np.float32)).all()) for clip in values]
    if failed != [outcome.status == "failed" for outcome in commit.clips]:
        raise TubeletError(
            f"{root.url}/{key} was left by another run of shard {commit.shard}, and other clips failed there",
            "Delete that object, and run the extraction again",
        )
    digest = digest_of([data], clips, size)
    if kind == ACTIVATIONS:
        adopted = Moments.empty(hook.channels, nonfinite=moments[hook.name].nonfinite)
        for clip, is_failed in zip(values, failed, strict=True):
            if not is_failed:
                adopted = adopted.merge(Moments.of(clip.reshape(-1, hook.channels)))
        moments[hook.name] = adopted
    return StoredObject(key=key, size_bytes=len(data), sha256=digest.sha256, crc32c=digest.crc32c)
