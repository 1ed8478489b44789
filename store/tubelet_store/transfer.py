"""Copies of objects and whole stores, verified where they are read and where they are written.

    source ─▶ scratch file (digest against the manifest) ─▶ target, whole or not at all ─▶ read back (digest again)

A copy is resumable because objects appear whole: what is at the target with the right digest is done. Its `zarr.json`
goes last, so an unfinished copy cannot be opened.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tubelet.concurrency import in_parallel
from tubelet.errors import TubeletError
from tubelet_store.commit import Commit, StoredObject, committed_shards
from tubelet_store.digest import ObjectDigest, digest_of
from tubelet_store.manifest import Manifest
from tubelet_store.object_keys import GROUP, MANIFEST, PLAN_TABLE, commit_key, commit_moments_key
from tubelet_store.reader import Store
from tubelet_store.storage import open_root
from tubelet_store.storage.local import link_or_copy
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.store_state import read_state

# Transfers are tried so often before the source or the target is called damaged.
ATTEMPTS = 3


class StoreCopy:
    """A copy of a complete store to `url`, begun or continued.

    Args:
        source: The store to copy.
        url: Where to: a path or any fsspec URL.
        read_back: Compare digests at the target too; without, only lengths.

    Raises:
        TubeletError: the source is unfinished; `url` holds something else.
    """

    def __init__(self, source: Store, url: str, read_back: bool = True) -> None:
        if not source.complete:
            raise TubeletError(f"{source.url} is unfinished", "Finish it first: run its `tubelet extract` again")
        self._source, self._read_back = source, read_back
        self._target = open_root(url)
        self.manifest: Manifest = source.manifest()
        present = read_state(self._target)
        if present is not None and present.identity != source.identity:
            raise TubeletError(
                f"{url} holds another store ({present.identity or 'unfinished'})", "Choose another destination"
            )
        expected = {*self.manifest.keys, GROUP, PLAN_TABLE, MANIFEST, *self._commit_keys()}
        if present is None and (foreign := sorted(set(self._target.list_keys()) - expected)):
            raise TubeletError(
                f"{url} is not empty: {foreign[0]} is no part of {source.url}",
                "Choose a new destination, or empty this one",
            )

    def run(self, threads: int = 8) -> Iterator[tuple[StoredObject, bool]]:
        """Copy what is missing; yields each object of the manifest, and whether it was transferred.

        Raises:
            TubeletError: an object cannot be had, or cannot be written, undamaged.
        """
        yield from in_parallel(self._copy, self.manifest, threads)
        for _ in in_parallel(self._copy, self._records(), threads):
            pass
        for key in (MANIFEST, GROUP):
            self._copy(StoredObject.of(key, self._source.root.read(key)))

    def _copy(self, stored: StoredObject) -> bool:
        if holds(self._target, stored, self._read_back):
            return False
        transfer(self._source.root, self._target, stored, self._read_back)
        return True

    def _commit_keys(self) -> set[str]:
        return {key(shard) for shard in self._source.committed for key in (commit_key, commit_moments_key)}

    def _records(self) -> Iterator[StoredObject]:
        """The planned table and the commit records: not in the manifest, but what appending later builds on."""
        root = self._source.root
        if root.size(PLAN_TABLE) is not None:
            yield StoredObject.of(PLAN_TABLE, root.read(PLAN_TABLE))
        for shard in committed_shards(root):
            commit = self._checked(self._source.commit_record(shard))
            yield commit.moments
            yield StoredObject.of(commit_key(shard), root.read(commit_key(shard)))

    def _checked(self, commit: Commit) -> Commit:
        for stored in commit.objects:
            if self.manifest.get(stored.key) != stored:
                raise TubeletError(
                    f"{self._source.url}/{commit_key(commit.shard)} and the manifest differ about {stored.key}",
                    "Run `tubelet verify` on that store",
                )
        return commit


def transfer(source: ObjectRoot, target: ObjectRoot, stored: StoredObject, read_back: bool = True) -> None:
    """Copy one object, checked where it is read and where it is written. It appears at the target whole or not at all.

    Args:
        source: Where to read it.
        target: Where to write it; an object of that name is replaced, never changed in place.
        stored: What it must be.
        read_back: Compare its digest at the target too, instead of trusting its length there.

    Raises:
        TubeletError: it is missing or damaged at the source, or damaged on arrival, three times over.
    """
    with target.scratch() as folder, fetch(source, stored, folder) as path:
        for _ in range(ATTEMPTS):
            upload = folder / "upload"
            # Publishing takes the file away, and a damaged arrival needs it again.
            link_or_copy(path, upload)
            target.publish(stored.key, upload)
            if holds(target, stored, read_back):
                return
    raise TubeletError(
        f"{target.url}/{stored.key} was written {ATTEMPTS} times and is damaged there each time",
        "Check the disk or the object storage of the target",
    )


@contextlib.contextmanager
def fetch(source: ObjectRoot, stored: StoredObject, folder: Path | None = None) -> Iterator[Path]:
    """A verified local copy of one object, gone on leaving.

    Args:
        source: Where to read it.
        stored: What it must be.
        folder: Folder of the copy; default: a temporary one.

    Raises:
        TubeletError: it is missing, or read three times it was damaged each time.
    """
    with contextlib.ExitStack() as resources:
        if folder is None:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="tubelet-")))
        path = folder / "fetched"
        for _ in range(ATTEMPTS):
            try:
                digest = _download(source, stored.key, path)
            except FileNotFoundError as error:
                raise TubeletError(
                    f"{source.url}/{stored.key} is missing", "Run `tubelet verify` on that store"
                ) from error
            if (digest.size_bytes, digest.sha256) == (stored.size_bytes, stored.sha256):
                yield path
                return
    raise TubeletError(
        f"{source.url}/{stored.key} is damaged: read {ATTEMPTS} times, it never has the digest in the manifest",
        "Run `tubelet verify` on that store; repair it with --from ANOTHER_COPY",
    )


def holds(root: ObjectRoot, stored: StoredObject, read_back: bool = True) -> bool:
    """The object is at `root`, with its length and (unless `read_back` is off) its digest."""
    if root.size(stored.key) != stored.size_bytes:
        return False
    return not read_back or digest_of(root.chunks(stored.key)).sha256 == stored.sha256


def _download(root: ObjectRoot, key: str, path: Path) -> ObjectDigest:
    digest = ObjectDigest()
    with path.open("wb") as file:
        for chunk in root.chunks(key):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest
