"""Files that are either whole or absent, also after a power cut; and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the exclusive lock of the file `path`, created if missing. The lock ends with its process.

    Args:
        path: A file for the lock alone.
        wait: Wait while another process holds it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is off.
    """
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last holder may have removed the file: a lock on an unlinked file excludes no other process.
            if not os.fstat(file.fileno()).st_nlink:
                continue
            yield
            return


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    synchronize(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path` and wait until it is on the disk.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # Of a full disk the system names no file.
        error.filename = error.filename or os.fspath(path)
        raise


def synchronize(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
