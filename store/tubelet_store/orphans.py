"""Objects that killed jobs left in a store: listed, and removed on request.

Only objects with names of this format are removed. A shard object of an unfinished store may belong to a running job,
whose commit record comes last, so young objects are kept. Files of other programs are never removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tubelet_store.commit import committed_shards
from tubelet_store.format import array_kinds
from tubelet_store.manifest import Manifest
from tubelet_store.object_keys import (
    ACTIVATIONS,
    COMMITS,
    GROUP,
    MANIFEST,
    MOMENTS,
    PLAN_TABLE,
    SPECIAL,
    commit_key,
    commit_moments_key,
)
from tubelet_store.reader import Store
from tubelet_store.verify import expected_objects

_OURS = re.compile(
    rf"(({ACTIVATIONS}|{SPECIAL})/[\w.]+/(zarr\.json|c/\d+/0/0/0)"
    rf"|{MOMENTS}/[\w./]+"
    rf"|{COMMITS}/\d{{6,}}\.(json|moments\.safetensors))"
)


@dataclass(frozen=True)
class Orphan:
    """An object that neither manifest nor commit records name."""

    key: str
    size_bytes: int
    kept_because: str | None
    """Why it is not to be removed; None: it may go."""


def orphan_keys(store: Store) -> list[str]:
    """Keys of objects that neither manifest nor commit records name: of killed writers, or of other programs."""
    objects = expected_objects(store)
    known = set(objects.keys) if isinstance(objects, Manifest) else {stored.key for stored in objects}
    known |= {GROUP, PLAN_TABLE, MANIFEST}
    for shard in committed_shards(store.root):
        if shard < store.plan.shards:
            known |= {commit_key(shard), commit_moments_key(shard)}
    if not store.complete:
        known |= {f"{kind}/zarr.json" for kind in array_kinds(store.plan)}
        known |= {f"{kind}/{hook.name}/zarr.json" for kind in array_kinds(store.plan) for hook in store.plan.hooks}
    return [key for key in store.root.list_keys() if key not in known]


def find_orphans(store: Store, older_than_s: float) -> list[Orphan]:
    """Orphans of `store`.

    Args:
        store: The store, complete or not.
        older_than_s: Younger ones are kept: a running writer may be about to commit them.
    """
    orphans = []
    for key in orphan_keys(store):
        size = store.root.size(key)
        if size is None:
            continue
        age = store.root.age_s(key)
        reason = None
        if _OURS.fullmatch(key) is None:
            reason = "not of this format: remove it manually"
        elif age is None or age < older_than_s:
            reason = "of unknown age" if age is None else f"only {age / 3600:.1f} h old"
        orphans.append(Orphan(key, size, reason))
    return orphans


def remove(store: Store, orphan: Orphan) -> None:
    """Remove one that may go."""
    if orphan.kept_because is None:
        store.root.delete(orphan.key)
