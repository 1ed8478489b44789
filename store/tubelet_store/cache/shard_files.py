"""The folder of a cache: complete objects, partial ones, a budget, and the locks that let processes share them.

objects/<sha256>            complete and checked; a shared lock on one keeps it
partial/<sha256>[.arrived]  being filled by the holder of its exclusive lock; which parts have arrived
lock                        held while files are added or removed
boots                       boot ids of the machine under which the objects were checked
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from tubelet.durable_files import locked
from tubelet.errors import TubeletError
from tubelet_store.cache.partial_file import ARRIVED, PartialFile
from tubelet_store.cache.shard_object import ShardObject
from tubelet_store.commit import StoredObject

_OBJECTS, _PARTIAL, _LOCK, _BOOTS = "objects", "partial", "lock", "boots"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# How long to wait for space that other processes hold, or for a download of another process without progress.
_PATIENCE_S = 600.0
_POLL_S = 0.02


class NoRoom(Exception):
    """No space can be freed."""


class ShardFiles:
    """The folder at `path`, in which this process keeps at most `budget_bytes` when it adds something.

    Attributes:
        expected: Digests of the objects that this process will need, and when: smaller numbers sooner.
    """

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self.path, self.budget_bytes = path, budget_bytes
        self.expected: Mapping[str, int] = {}
        self._is_boot_checked = False

    def has(self, stored: StoredObject) -> bool:
        """A file of that name is complete; `pinned` looks closer."""
        return self._object(stored).exists()

    def held_bytes(self) -> int:
        """Bytes in the folder: complete objects and room reserved for those that are coming."""
        if not self.path.is_dir():
            return 0
        # Without the lock a file that goes and one that takes its room could both be counted.
        with self._locked():
            return self._held_bytes()

    def pinned(self, stored: StoredObject) -> BinaryIO | None:
        """The complete object, locked against eviction; None where it is not here."""
        self._check_boot()
        path = self._object(stored)
        with contextlib.suppress(FileNotFoundError):
            file = path.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            # Evicted between opening and locking: readable still, but no longer counted.
            if status.st_nlink == 1 and status.st_size == stored.size_bytes:
                os.utime(file.fileno())
                return file
            file.close()
            if status.st_nlink == 1:
                # Another program changed its length.
                self._evict(path)
        return None

    @staticmethod
    def unpin(file: BinaryIO) -> None:
        """Let the object be evicted, before its file is closed."""
        fcntl.flock(file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def claimed(self, wanted: ShardObject, name: str) -> Iterator[PartialFile]:
        """The partial file of the object, held by this process alone; waits while another one downloads it.

        Args:
            wanted: The object.
            name: What to call it in errors.

        Raises:
            TubeletError: its holder makes no progress.
        """
        # Again: the user may have removed the whole cache.
        self._make_folders()
        path = self.path / _PARTIAL / wanted.stored.sha256
        progress, since = -1.0, time.monotonic()
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Finished or evicted while this process waited: the lock is on a file without a name.
                if os.fstat(descriptor).st_nlink:
                    break
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                seen = path.with_suffix(ARRIVED).stat().st_mtime
                progress, since = seen, since if seen == progress else time.monotonic()
            if time.monotonic() - since > _PATIENCE_S:
                raise TubeletError(
                    f"{name} is locked by another process that has made no progress for {_PATIENCE_S:g} s",
                    f"Find who holds {path} (`fuser`), end it, and run the same command again",
                )
            time.sleep(_POLL_S)
        partial = PartialFile(path, descriptor, len(wanted.parts()))
        try:
            yield partial
        finally:
            partial.close()

    def reserve(self, partial: PartialFile, stored: StoredObject, demanded: bool) -> None:
        """Make room for the object and allocate its partial file whole.

        Args:
            partial: Claimed.
            stored: What it will hold.
            demanded: Evict what is expected too, and wait for room; without, raise NoRoom.

        Raises:
            TubeletError: the disk is full, or open memory maps fill the budget and stay open.
        """
        start = time.monotonic()
        while True:
            disk_full = False
            with self._locked():
                excess_bytes = self._held_bytes() - partial.reserved_bytes + stored.size_bytes - self.budget_bytes
                while self._make_room(partial, excess_bytes, demanded):
                    if partial.allocate(stored.size_bytes):
                        return
                    # The disk fills before the budget: continue while there is something to evict.
                    excess_bytes, disk_full = 1, True
                if disk_full:
                    raise self.disk_full(stored)
            if not demanded:
                raise NoRoom
            if time.monotonic() - start > _PATIENCE_S:
                raise TubeletError(
                    f"The cache in {self.path} is full: open memory maps leave no evictable space for {stored.key}"
                    f" ({stored.size_bytes} bytes) within the budget of {self.budget_bytes} bytes",
                    "Set a larger budget, or delete arrays that are not needed",
                )
            time.sleep(_POLL_S)

    def disk_full(self, stored: StoredObject) -> TubeletError:
        """The error that the disk takes no more of the object."""
        return TubeletError(
            f"{self.path}: the disk has no room for {stored.size_bytes} bytes"
            f" ({shutil.disk_usage(self.path).free} are free)",
            "Free some space, or set the cache's directory to another disk; complete shards are kept",
        )

    def keep(self, partial: PartialFile, stored: StoredObject) -> BinaryIO:
        """Move the finished file to its place, and pin it before it can be evicted."""
        path = self._object(stored)
        with self._locked():
            os.rename(partial.path, path)
            partial.forget()
            file = path.open("rb")
            # The exclusive lock of the claim would refuse the shared one.
            fcntl.flock(partial.descriptor, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def _object(self, stored: StoredObject) -> Path:
        return self.path / _OBJECTS / stored.sha256

    def _held_bytes(self) -> int:
        return sum(status.st_size for _, status in self._files())

    def _make_room(self, partial: PartialFile, excess_bytes: int, demanded: bool) -> bool:
        """Evict at least `excess_bytes`, least needed first; False where what is in use leaves too little."""
        if excess_bytes <= 0:
            return True
        expected = self.expected
        # First files that this process will not need, least recently used first; then those it needs last.
        candidates = sorted(
            (-expected.get(path.name, len(expected)), status.st_mtime_ns, status.st_size, path)
            for path, status in self._files()
            if path != partial.path and (demanded or path.name not in expected)
        )
        for _, _, size_bytes, path in candidates:
            if self._evict(path):
                excess_bytes -= size_bytes
            if excess_bytes <= 0:
                return True
        return False

    def _evict(self, path: Path) -> bool:
        """Unlink the file unless a process uses it."""
        with contextlib.suppress(FileNotFoundError), _unused(path) as unused:
            if unused:
                path.unlink(missing_ok=True)
                path.with_suffix(ARRIVED).unlink(missing_ok=True)
            return unused
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for name in (_OBJECTS, _PARTIAL):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path / name) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if not entry.name.endswith(ARRIVED):
                            yield Path(entry.path), entry.stat()

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which files are added and removed."""
        return locked(self.path / _LOCK)

    def _make_folders(self) -> None:
        for name in (_OBJECTS, _PARTIAL):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def _check_boot(self) -> None:
        """Objects written before the last boot may have lost bytes in a power cut: move them to the partial files."""
        if self._is_boot_checked:
            return
        self._make_folders()
        try:
            boot = _BOOT_ID.read_text().strip()
        except OSError:
            # Unknown: as if it had just been started.
            boot = uuid.uuid4().hex
        boots = self.path / _BOOTS
        with self._locked():
            known = boots.read_text().split() if boots.exists() else []
            if boot not in known:
                for path in (self.path / _OBJECTS).glob("*"):
                    with contextlib.suppress(FileNotFoundError), _unused(path) as unused:
                        if unused:
                            PartialFile.from_complete(path, self.path / _PARTIAL / path.name)
                boots.write_text("".join(f"{each}\n" for each in [*known, boot]))
        self._is_boot_checked = True


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether no process uses the file, and none can start to inside the block. Raises FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
