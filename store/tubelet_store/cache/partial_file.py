"""A file of the cache while it is downloaded."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tubelet_store.cache.shard_object import Part, ShardObject, most_parts

ARRIVED = ".arrived"

# The disk, the user's quota or a limit of the process is reached.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartialFile:
    """A file being downloaded; a second file next to it has one byte per part that arrived."""

    def __init__(self, path: Path, descriptor: int, parts: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._parts = parts
        # File systems let one thread at a time write to a file; those that wait in the kernel burn processor time.
        self._writing = threading.Lock()
        self._map = os.open(path.with_suffix(ARRIVED), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @classmethod
    def from_complete(cls, complete: Path, path: Path) -> None:
        """Make a complete file partial again, every part of it to be checked; it goes where there is one already."""
        if path.exists():
            complete.unlink()
            return
        parts = most_parts(complete.stat().st_size)
        path.with_suffix(ARRIVED).write_bytes(b"\1" * parts)
        os.rename(complete, path)

    @property
    def reserved_bytes(self) -> int:
        """Disk space that the file takes."""
        return os.fstat(self.descriptor).st_size

    def allocate(self, size_bytes: int) -> bool:
        """Allocate the space on disk; False where there is too little. Raises OSError: no file may be that long."""
        before = self.reserved_bytes
        try:
            os.posix_fallocate(self._map, 0, self._parts)
            os.posix_fallocate(self.descriptor, 0, size_bytes)
        except OSError as error:
            os.ftruncate(self.descriptor, before)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return True

    def arrived(self) -> NDArray[np.bool_]:
        """[parts] Parts written by this or an earlier process."""
        noted = os.pread(self._map, self._parts, 0).ljust(self._parts, b"\0")
        return np.frombuffer(noted, np.uint8) == 1

    def damaged(self, wanted: ShardObject, part: Part) -> bool:
        """Whether a part marked as arrived is missing: a power failure may leave the mark without the bytes."""
        data = np.frombuffer(os.pread(self.descriptor, part.stop - part.start, part.start), np.uint8)
        return len(data) != part.stop - part.start or wanted.damaged(part, data) is not None

    def write(self, part: Part, data: NDArray[np.uint8]) -> None:
        """Write a checked part. Raises OSError where the disk is full although space was allocated."""
        view, position = data.data, part.start
        with self._writing:
            while len(view):
                written = os.pwrite(self.descriptor, view, position)
                view, position = view[written:], position + written
            os.pwrite(self._map, b"\1", part.number)

    def sha256(self) -> str:
        """Hex digest of the file."""
        with mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()

    def forget(self) -> None:
        """Nothing has arrived."""
        os.ftruncate(self._map, 0)
        self.path.with_suffix(ARRIVED).unlink(missing_ok=True)

    def drop(self) -> None:
        """Free the space; `close` removes the file."""
        os.ftruncate(self.descriptor, 0)

    def close(self) -> None:
        """Give the claim back; a file that nothing was written to goes."""
        if self.reserved_bytes == 0:
            self.path.unlink(missing_ok=True)
            self.forget()
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self._map)
        os.close(self.descriptor)
