"""The interface to the objects of a store, local or remote."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

# What S3's own guidance calls a typical range request.
CHUNK_BYTES = 8 << 20


class ObjectRoot(ABC):
    """The objects below one URL, by key ("activations/blocks.3/c/0/0/0/0")."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    @abstractmethod
    def chunks(self, key: str) -> Iterator[bytes]:
        """The object in pieces of at most 8 MiB. Raises FileNotFoundError."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""

    @abstractmethod
    def age_s(self, key: str) -> float | None:
        """Seconds since the object was written, None where that cannot be known."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; where there is none, nothing happens."""

    @abstractmethod
    def list_keys(self, prefix: str = "") -> list[str]:
        """Keys of the objects below `prefix` (a folder), sorted; scratch files are not objects."""

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write the object whole, over an older one if there is one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists; False where it did."""

    @abstractmethod
    def publish(self, key: str, finished: Path) -> None:
        """Move the finished scratch file to `key`."""

    @abstractmethod
    def deposit(self, key: str, finished: Path, sha256: str) -> bool:
        """Make the finished file, whose digest is given, the object, unless another writer's bytes are there.

        Returns:
            False where they do (never under `exclusive`, where the root can lock): they are left as they are.
        """

    @abstractmethod
    def settle(self, key: str, data: bytes) -> bytes:
        """Write the companion of a deposited object: over an older one under `exclusive`, else unless it exists.

        Returns:
            The content that is there now.
        """

    @abstractmethod
    def probe_create(self) -> bool:
        """Whether `create` keeps two writers apart here; warns where it does not."""

    @abstractmethod
    def exclusive(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock `name` among the writers of this root, where the root can lock; freed when its holder ends."""

    @abstractmethod
    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A fresh local directory for unfinished files, removed on leaving."""

    @abstractmethod
    def discard_scratch(self) -> None:
        """Remove the unfinished files of writers that have ended."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Path to memory-map, None where the root is remote."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room left, None where that cannot be known."""
