"""Objects as files below a directory.

An object is written under `.tmp/`, synced, then renamed or linked into place, so a reader (or a power cut) sees the
whole object or none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tubelet.durable_files import locked, synchronize, write_durably
from tubelet_store.storage.object_root import CHUNK_BYTES, ObjectRoot

SCRATCH = ".tmp"
_OWNER = "owner.lock"

# What a file system answers that has no hard links, or no more of them for this file.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class LocalRoot(ObjectRoot):
    """Objects as files below a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.url = str(self.directory)

    def read(self, key: str) -> bytes:
        """See ObjectRoot."""
        return (self.directory / key).read_bytes()

    def chunks(self, key: str) -> Iterator[bytes]:
        """See ObjectRoot."""
        with (self.directory / key).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def size(self, key: str) -> int | None:
        """See ObjectRoot."""
        try:
            return (self.directory / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def age_s(self, key: str) -> float | None:
        """See ObjectRoot."""
        try:
            return time.time() - (self.directory / key).stat().st_mtime
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """See ObjectRoot. Folders that it leaves empty go too."""
        path = self.directory / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            while (path := path.parent) != self.directory:
                path.rmdir()

    def list_keys(self, prefix: str = "") -> list[str]:
        """See ObjectRoot."""
        keys = []
        for folder, below, names in os.walk(self.directory / prefix):
            if SCRATCH in below:
                below.remove(SCRATCH)
            keys += [(Path(folder) / name).relative_to(self.directory).as_posix() for name in names]
        return sorted(keys)

    def replace(self, key: str, data: bytes) -> None:
        """See ObjectRoot."""
        with self._temporary(data) as temporary:
            self._rename(temporary, key)

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectRoot."""
        target = self.directory / key
        with self._temporary(data) as temporary:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # Whoever creates here meets the same, and takes the same lock.
                with self.exclusive("create"):
                    if target.exists():
                        return False
                    temporary.rename(target)
            synchronize(target.parent)
        return True

    def publish(self, key: str, finished: Path) -> None:
        """See ObjectRoot."""
        self._rename(finished, key)

    def deposit(self, key: str, finished: Path, sha256: str) -> bool:  # noqa: ARG002
        """See ObjectRoot. Without a record, an object there was left by a writer that ended."""
        self._rename(finished, key)
        return True

    def settle(self, key: str, data: bytes) -> bytes:
        """See ObjectRoot."""
        self.replace(key, data)
        return data

    def probe_create(self) -> bool:
        """See ObjectRoot. A hard link is created once, and where there are none a lock decides."""
        return True

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """See ObjectRoot."""
        folder = self.directory / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{name}.lock"):
            yield

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """See ObjectRoot. A lock held inside shows that its owner runs."""
        with contextlib.ExitStack() as lock:
            folder = self._owned_folder(lock)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _owned_folder(self, lock: contextlib.ExitStack) -> Path:
        while True:
            folder = self.directory / SCRATCH / uuid.uuid4().hex
            # Until its lock is held, `discard_scratch` may take it for that of a writer that ended.
            with contextlib.suppress(FileNotFoundError):
                folder.mkdir(parents=True)
                lock.enter_context(locked(folder / _OWNER))
                return folder

    def discard_scratch(self) -> None:
        """See ObjectRoot."""
        scratch = self.directory / SCRATCH
        for lock in [*scratch.glob(f"*/{_OWNER}"), *scratch.glob("*.lock")]:
            with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(lock, wait=False):
                if lock.name == _OWNER:
                    shutil.rmtree(lock.parent, ignore_errors=True)
                else:
                    lock.unlink()
        # Killed before they locked theirs, writers leave empty folders.
        for folder in [*scratch.glob("*/"), scratch]:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def local_path(self, key: str) -> Path | None:
        """See ObjectRoot."""
        return self.directory / key

    def free_bytes(self) -> int | None:
        """See ObjectRoot."""
        existing = self.directory
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        with self.scratch() as folder:
            path = folder / "object"
            write_durably(path, data)
            yield path

    def _rename(self, finished: Path, key: str) -> None:
        target = self.directory / key
        target.parent.mkdir(parents=True, exist_ok=True)
        finished.replace(target)
        synchronize(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes a second name of the file, or a copy of it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)
