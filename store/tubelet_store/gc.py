"""What dead jobs left in a store: found, and removed when asked.

Only objects that this format names, and that belong to nothing, are ever removed: a shard object of an unfinished store
may be a living job's, whose record comes last, so young ones are left too. Files of other programs are not ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tubelet_store.object_keys import ACTIVATIONS, COMMITS, MOMENTS, SPECIAL
from tubelet_store.reader import Store
from tubelet_store.verify import orphans

_OURS = re.compile(
    rf"(({ACTIVATIONS}|{SPECIAL})/[\w.]+/(zarr\.json|c/\d+/0/0/0)"
    rf"|{MOMENTS}/[\w./]+"
    rf"|{COMMITS}/\d{{6,}}\.(json|moments\.safetensors))"
)


@dataclass(frozen=True)
class Orphan:
    """An object that belongs to nothing."""

    key: str
    size_bytes: int
    kept_because: str | None
    """Why it is not to be removed; None: it may go."""


def find_orphans(store: Store, older_than_s: float) -> list[Orphan]:
    """Objects of `store` that belong to nothing.

    Args:
        store: The store, complete or not.
        older_than_s: Younger ones are kept: a living writer may be about to record them.
    """
    found = []
    for key in orphans(store):
        size = store.root.size(key)
        if size is None:
            continue
        age = store.root.age_s(key)
        reason = None
        if _OURS.fullmatch(key) is None:
            reason = "not of this format: remove it by hand"
        elif age is None or age < older_than_s:
            reason = "of unknown age" if age is None else f"only {age / 3600:.1f} h old"
        found.append(Orphan(key, size, reason))
    return found


def remove(store: Store, orphan: Orphan) -> None:
    """Remove one that may go."""
    if orphan.kept_because is None:
        store.root.delete(orphan.key)
