"""Settings of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field

from tubelet.config import Config
from tubelet.paths import cache_folder
from tubelet_store.storage.client_choice import TransportName


class CacheConfig(Config):
    """Where shards of remote stores are kept, how much of them, how they are fetched."""

    directory: Path | None = None
    """Folder on a local disk, shared by all jobs of the machine; none: `shards` in $TUBELET_CACHE, else in
    ~/.cache/tubelet."""
    budget: ByteSize = ByteSize(100 * 2**30)
    """Most bytes kept, e.g. `500GB`; shards not used for longest go first."""
    connections: int = Field(default=8, ge=1)
    """Range requests at once."""
    transport: TransportName = "auto"
    """Client: `obstore` (S3, twice as fast as s3fs), `fsspec` (always works); auto: obstore where it is installed."""
    check: Literal["crc32c", "sha256"] = "crc32c"
    """Proof that the bytes are right: every clip's checksum, or in addition the object's digest, which also shows
    deliberate forgery and costs several times the processor time."""
    attempts: int = Field(default=8, ge=1)
    """How often a part is asked for, when it fails or arrives damaged, before that is an error."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Silence after which a request is made again."""

    @property
    def folder(self) -> Path:
        """The directory, defaults resolved."""
        return cache_folder("shards") if self.directory is None else self.directory.expanduser().absolute()
