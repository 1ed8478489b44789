"""A local cache of remote shards: what is mapped here has the bytes that the manifest says, or it is an error.

    open(object) ─▶ objects/<sha256> there? ─▶ open file, shared lock ─▶ memory map
                        │ no
                        ▼
    claim (lock on partial/<sha256>) ─▶ room (evict, reserve) ─▶ parts in parallel, each checked ─▶ rename into objects/

The directory is the whole state, and every process of a node may share it, whatever stores and jobs they work on:

* Files are named by the digest of their content, so versions of a store share what is equal and never mix.
* A reader holds a shared lock on the file it maps. The memory map keeps the file open, so the lock lasts exactly as
  long as the map and ends with the process, however that ends. Whoever evicts takes an exclusive lock first: a file in
  use stays. Eviction is by unlink, files are never written again.
* One process at a time downloads an object: the one with the lock on its partial file. Of a download that was cut off
  the parts that arrived are kept, and checked again before they count.
* Room is decided under one lock for the directory, and reserved by allocating the partial file whole: the files never
  exceed the budget. Several jobs with several budgets each keep their own when they fetch.
* Nothing waits for the disk (that took a third of the time). A power cut may therefore lose bytes that were written:
  whoever comes first after the machine was started again moves every object back among the partial ones, so that each
  is checked before it counts, and what was lost is fetched.

Locks are released by name (LOCK_UN), not only by closing: a child forked meanwhile holds the same open file.
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
