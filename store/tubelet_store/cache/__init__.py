"""Local cache of remote shards: a mapped file has the bytes that the manifest describes, or opening it is an error.

    open(object) ─▶ objects/<sha256> there? ─▶ open file, shared lock ─▶ memory map
                        │ no
                        ▼
    claim (lock on partial/<sha256>) ─▶ room (evict, reserve) ─▶ parts in parallel, each checked ─▶ rename into objects/

All state is in one directory, which all processes of a machine share, for any stores and jobs:

* Files are named by the digest of their content: versions of a store share equal shards and cannot be confused.
* A reader holds a shared lock on the file it maps. The memory map keeps the file open, so the lock lasts exactly as
  long as the map and ends with the process, however that ends. Eviction needs an exclusive lock: files in use stay.
  Evicted files are unlinked; complete files are never written again.
* One process at a time downloads an object: the holder of the lock on its partial file. After an interruption the parts
  that arrived are kept, and verified again before they are used.
* Space is reserved under one lock for the directory, by allocating the whole partial file: the files never exceed the
  budget. Jobs with different budgets each observe their own when they fetch.
* Files are not synced (fsync took a third of the time), so a power cut may lose bytes. The first process after a boot
  therefore moves every object to the partial files; each is verified on its next use, and lost parts are fetched.

Locks are released by name (LOCK_UN), not only by closing: a child forked in between holds the same open file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field

from tubelet.config import Config
from tubelet.paths import cache_folder
from tubelet_store.storage.client import ClientName


class CacheConfig(Config):
    """Where shards of remote stores are kept on a local disk, how many, and how they are fetched."""

    directory: Path | None = None
    """Folder on a local disk, shared by all jobs of the machine; none: `shards` in $TUBELET_CACHE, else in
    ~/.cache/tubelet."""
    budget: ByteSize = ByteSize(100 * 2**30)
    """Maximum size, e.g. `500GB`; the least recently used shards are evicted first."""
    connections: int = Field(default=8, ge=1)
    """Parallel range requests."""
    client: ClientName = "auto"
    """`obstore` (S3 only, twice as fast as s3fs) or `fsspec` (any URL); auto: obstore if it is installed."""
    check: Literal["crc32c", "sha256"] = "crc32c"
    """How downloads are verified: by each clip's checksum, or by the object's SHA-256 too, which also detects
    deliberate changes and takes several times the processor time."""
    attempts: int = Field(default=8, ge=1)
    """Requests per part before a failed or damaged download is an error."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds without data after which a request is repeated."""

    @property
    def folder(self) -> Path:
        """The directory, defaults resolved."""
        return cache_folder("shards") if self.directory is None else self.directory.expanduser().absolute()
