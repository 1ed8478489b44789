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

Locks are released by name (LOCK_UN), not only by closing: a child forked meanwhile holds the same open file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from pydantic import ByteSize, Field

from tubelet_store.commit import StoredObject
from tubelet_store.config import Config
from tubelet_store.errors import TubeletError
from tubelet_store.transport import Patience, PerProcess, Transport, TransportName, open_transport

_OBJECTS, _PARTIAL, _LOCK, _ARRIVED = "objects", "partial", "lock", ".arrived"

# A part is a whole number of clips, so that it can be checked when it arrives; see benchmarks/results/remote.txt.
_PART_BYTES = 8 << 20

# Objects fetched ahead at once: the second one keeps the connections busy while the first one ends.
_AHEAD = 2

# How long to wait for room that others hold, or for an object that another process fetches and does not get on with.
_PATIENCE_S = 600.0
_POLL_S = 0.02


class MirrorConfig(Config):
    """Where shards of remote stores are kept, how much of them, how they are fetched."""

    directory: Path | None = None
    """Folder on a local disk, shared by all jobs of the machine; none: $TUBELET_CACHE, else ~/.cache/tubelet."""
    budget: ByteSize = ByteSize(100 * 2**30)
    """Most bytes kept, e.g. `500GB`; shards not used for longest go first."""
    connections: int = Field(default=8, ge=1)
    """Range requests at once."""
    transport: TransportName = "auto"
    """Client: `obstore` (less processor time), `fsspec` (always works); auto: obstore where it is installed."""
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
        named = self.directory or os.environ.get("TUBELET_CACHE") or Path("~/.cache/tubelet")
        return Path(named).expanduser().absolute()


@dataclass(frozen=True)
class ShardObject:
    """A shard object to fetch, with what proves that it is right."""

    stored: StoredObject
    clip_bytes: int
    first_clip: int
    tail: bytes
    """The bytes after the clips: the index that the plan implies."""

    def parts(self) -> list[_Part]:
        """The object cut into ranges of whole clips; the tail is in the last."""
        clips = len(self.stored.crc32c)
        each = max(1, _PART_BYTES // self.clip_bytes)
        firsts = range(0, clips, each)
        stops = [min(first + each, clips) for first in firsts]
        ends = [stop * self.clip_bytes for stop in stops[:-1]] + [self.stored.size_bytes]
        return [
            _Part(number, range(first, stop), first * self.clip_bytes, end)
            for number, (first, stop, end) in enumerate(zip(firsts, stops, ends, strict=True))
        ]

    def damaged(self, part: _Part, data: NDArray[np.uint8]) -> str | None:
        """What is wrong with the bytes of `part`; None: nothing."""
        for clip in part.clips:
            start = clip * self.clip_bytes - part.start
            if int(google_crc32c.value(data[start : start + self.clip_bytes])) != self.stored.crc32c[clip]:
                return f"clip {self.first_clip + clip}"
        end_of_clips = part.clips.stop * self.clip_bytes - part.start
        if part.stop == self.stored.size_bytes and data[end_of_clips:].tobytes() != self.tail:
            return "the index"
        return None


@dataclass(frozen=True)
class _Part:
    number: int
    clips: range
    """Clips within the shard."""
    start: int
    stop: int


class Mirror:
    """Shards of the store at `url`, kept in a directory under a budget. One per process and store.

    Args:
        url: The store's URL.
        config: Directory, budget, client.
    """

    def __init__(self, url: str, config: MirrorConfig | None = None) -> None:
        self.url = url.rstrip("/")
        self.config = config or MirrorConfig()
        self.folder = self.config.folder
        patience = Patience(self.config.attempts, self.config.timeout_s)
        self._transport = PerProcess(lambda: open_transport(self.url, self.config.transport, patience))
        self._workers = PerProcess(lambda: _Workers(self.config.connections))
        self._ahead: list[ShardObject] = []

    def __reduce__(self) -> tuple[type[Mirror], tuple[str, MirrorConfig]]:
        return (Mirror, (self.url, self.config))

    @property
    def transport(self) -> Transport:
        """The client of this process."""
        return self._transport()

    def open(self, wanted: ShardObject) -> BinaryIO:
        """The object as a local file, complete and checked, fetched if need be.

        The file is locked against eviction while it, or a memory map of it, is open.

        Raises:
            TubeletError: it is larger than the budget, or there is no room because maps in use fill it; it cannot be
                reached; it arrives damaged every time.
        """
        return self._pinned(wanted.stored) or self._fetch(wanted)

    def fetch(self, wanted: ShardObject) -> bool:
        """Have the object here, without evicting what was asked for by `expect`; False where there is no room."""
        try:
            with self._pinned(wanted.stored) or self._fetch(wanted, demanded=False) as file:
                fcntl.flock(file, fcntl.LOCK_UN)
                return True
        except _NoRoom:
            return False

    def expect(self, coming: Iterable[ShardObject]) -> None:
        """Fetch `coming` in the background, in that order, as far as the budget allows.

        What is expected later is evicted later. Failures are not raised here: `open` meets them again.
        """
        room, ahead = int(self.config.budget), []
        for wanted in coming:
            room -= wanted.stored.size_bytes
            if room < 0:
                break
            ahead.append(wanted)
        self._ahead = ahead
        self._workers().expect(ahead, self._has, self.fetch)

    def held_bytes(self) -> int:
        """Bytes in the directory: complete objects and room reserved for those that are coming."""
        if not self.folder.is_dir():
            return 0
        # Without the lock a file that goes and one that takes its room could both be counted.
        with self._locked():
            return self._held_bytes()

    def _held_bytes(self) -> int:
        return sum(status.st_size for _, status in self._files())

    def _has(self, wanted: ShardObject) -> bool:
        return self._path(wanted.stored).exists()

    def _path(self, stored: StoredObject) -> Path:
        return self.folder / _OBJECTS / stored.sha256

    def _pinned(self, stored: StoredObject) -> BinaryIO | None:
        """The complete object, locked against eviction; None where it is not here."""
        path = self._path(stored)
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
                # Cut short or grown by somebody else's hand.
                self._evict(path)
        return None

    def _fetch(self, wanted: ShardObject, demanded: bool = True) -> BinaryIO:
        stored = wanted.stored
        if stored.size_bytes > self.config.budget:
            raise TubeletError(
                f"{self.url}/{stored.key} has {stored.size_bytes} bytes, the mirror in {self.folder} may hold"
                f" {int(self.config.budget)}",
                f"Set the mirror's budget to at least {stored.size_bytes} bytes, better several times that",
            )
        with self._claimed(wanted) as partial:
            if (file := self._pinned(stored)) is not None:
                return file
            self._reserve(partial, stored, demanded)
            self._download(partial, wanted)
            return self._keep(partial, stored)

    @contextlib.contextmanager
    def _claimed(self, wanted: ShardObject) -> Iterator[_Partial]:
        """The partial file of the object, held by this process alone; waits while another one downloads it."""
        for name in (_OBJECTS, _PARTIAL):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        path = self.folder / _PARTIAL / wanted.stored.sha256
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
                seen = path.with_suffix(_ARRIVED).stat().st_mtime
                progress, since = seen, since if seen == progress else time.monotonic()
            if time.monotonic() - since > _PATIENCE_S:
                raise TubeletError(
                    f"{self.url}/{wanted.stored.key} is being fetched by another process that does not get on",
                    f"Find who holds {path} (`fuser`), end it, and run the same command again",
                )
            time.sleep(_POLL_S)
        partial = _Partial(path, descriptor, len(wanted.parts()))
        try:
            yield partial
        finally:
            partial.close()

    def _reserve(self, partial: _Partial, stored: StoredObject, demanded: bool) -> None:
        """Make room for the object and allocate its partial file whole."""
        start = time.monotonic()
        while True:
            disk_full = False
            with self._locked():
                excess_bytes = self._held_bytes() - partial.reserved_bytes + stored.size_bytes - int(self.config.budget)
                while self._make_room(partial, excess_bytes, demanded):
                    if partial.allocate(stored.size_bytes):
                        return
                    # The disk is fuller than the budget knows: go on while there is something to evict.
                    excess_bytes, disk_full = 1, True
                if disk_full:
                    raise TubeletError(
                        f"{self.folder}: the disk has no room for {stored.size_bytes} bytes"
                        f" ({shutil.disk_usage(self.folder).free} are free)",
                        "Free some space, or set the mirror's directory to another disk; what has arrived is kept",
                    )
            if not demanded:
                raise _NoRoom
            if time.monotonic() - start > _PATIENCE_S:
                raise TubeletError(
                    f"The mirror in {self.folder} is full: maps in use leave no room for {stored.key}"
                    f" ({stored.size_bytes} bytes) under a budget of {int(self.config.budget)}",
                    "Set a larger budget, or let go of arrays that are not needed",
                )
            time.sleep(_POLL_S)

    def _make_room(self, mine: _Partial, excess_bytes: int, demanded: bool) -> bool:
        """Evict at least `excess_bytes`, least needed first; False where what is in use leaves too little."""
        if excess_bytes <= 0:
            return True
        expected = {wanted.stored.sha256: number for number, wanted in enumerate(self._ahead)}
        # What nobody here expects goes first, unused for longest first; then what is expected last.
        candidates = sorted(
            (-expected.get(path.name, len(expected)), status.st_mtime_ns, status.st_size, path)
            for path, status in self._files()
            if path != mine.path and (demanded or path.name not in expected)
        )
        for _, _, size_bytes, path in candidates:
            if self._evict(path):
                excess_bytes -= size_bytes
            if excess_bytes <= 0:
                return True
        return False

    def _evict(self, path: Path) -> bool:
        """Unlink the file unless somebody uses it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            path.with_suffix(_ARRIVED).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for name in (_OBJECTS, _PARTIAL):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / name) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        if not entry.name.endswith(_ARRIVED):
                            yield Path(entry.path), entry.stat()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in deciding what the directory holds."""
        with (self.folder / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _download(self, partial: _Partial, wanted: ShardObject) -> None:
        parts = wanted.parts()
        arrived = partial.arrived()
        missing = [part for part in parts if not arrived[part.number] or partial.damaged(wanted, part)]
        pool = self._workers().pool
        running = [pool.submit(self._bring, partial, wanted, part) for part in missing]
        _raise_first(running)
        if self.config.check == "sha256" and partial.sha256() != wanted.stored.sha256:
            partial.forget()
            raise TubeletError(
                f"{self.url}/{wanted.stored.key} arrived with another digest than the manifest's, although every clip's"
                " checksum is right: it was changed on purpose",
                "Do not use this copy; fetch the store from a source you trust",
            )
        os.fsync(partial.descriptor)

    def _bring(self, partial: _Partial, wanted: ShardObject, part: _Part) -> None:
        """Fetch one part, check it, write it."""
        damage: str | None = None
        for _ in range(self.config.attempts):
            try:
                data = self.transport.read_range(wanted.stored.key, part.start, part.stop)
            except FileNotFoundError as error:
                raise TubeletError(
                    f"{self.url}/{wanted.stored.key} is missing", "Run `tubelet verify` on the store"
                ) from error
            damage = wanted.damaged(part, data)
            if damage is None:
                partial.write(part, data)
                return
        raise TubeletError(
            f"{self.url}/{wanted.stored.key}: {damage} arrives damaged ({self.config.attempts} attempts)",
            "Run `tubelet verify` on the store; if it is damaged there, repair it from another copy",
        )

    def _keep(self, partial: _Partial, stored: StoredObject) -> BinaryIO:
        """Move the finished file to its place, and pin it before anybody can evict it."""
        path = self._path(stored)
        with self._locked():
            os.rename(partial.path, path)
            partial.forget()
            file = path.open("rb")
            # The exclusive lock of the claim would refuse the shared one.
            fcntl.flock(partial.descriptor, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_SH)
        return file


class _NoRoom(Exception):
    """There is no room that may be made."""


class _Partial:
    """A file that is being filled, and beside it one byte per part that has arrived."""

    def __init__(self, path: Path, descriptor: int, parts: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._parts = parts
        self._map = os.open(path.with_suffix(_ARRIVED), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @property
    def reserved_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def allocate(self, size_bytes: int) -> bool:
        """Take the room on the disk; False where there is none."""
        before = self.reserved_bytes
        try:
            os.posix_fallocate(self.descriptor, 0, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            os.ftruncate(self.descriptor, before)
            return False
        return True

    def arrived(self) -> NDArray[np.bool_]:
        """[parts] Parts written by this or an earlier process."""
        noted = os.pread(self._map, self._parts, 0).ljust(self._parts, b"\0")
        return np.frombuffer(noted, np.uint8) == 1

    def damaged(self, wanted: ShardObject, part: _Part) -> bool:
        """Whether a part that is said to be here is not: the note may have outlived the bytes, after a power cut."""
        data = np.frombuffer(os.pread(self.descriptor, part.stop - part.start, part.start), np.uint8)
        return len(data) != part.stop - part.start or wanted.damaged(part, data) is not None

    def write(self, part: _Part, data: NDArray[np.uint8]) -> None:
        view, position = data.data, part.start
        while len(view):
            written = os.pwrite(self.descriptor, view, position)
            view, position = view[written:], position + written
        os.pwrite(self._map, b"\1", part.number)

    def sha256(self) -> str:
        with mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()

    def forget(self) -> None:
        """Nothing has arrived."""
        os.ftruncate(self._map, 0)
        self.path.with_suffix(_ARRIVED).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the claim back; a file that nothing was written to goes."""
        if self.reserved_bytes == 0:
            self.path.unlink(missing_ok=True)
            self.forget()
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self._map)
        os.close(self.descriptor)


class _Workers:
    """The threads of one process: connections, and those that fetch ahead."""

    def __init__(self, connections: int) -> None:
        self.pool = ThreadPoolExecutor(connections, thread_name_prefix="tubelet-mirror")
        self._changed = threading.Condition()
        self._ahead: list[ShardObject] = []
        self._threads: list[threading.Thread] = []

    def expect(
        self,
        coming: list[ShardObject],
        has: Callable[[ShardObject], bool],
        fetch: Callable[[ShardObject], bool],
    ) -> None:
        with self._changed:
            self._ahead = [wanted for wanted in coming if not has(wanted)]
            self._changed.notify_all()
            while self._ahead and len(self._threads) < _AHEAD:
                # Daemons: a process that ends does not wait for what it will not use. The parts that came are kept.
                thread = threading.Thread(target=self._run, args=(fetch,), name="tubelet-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self, fetch: Callable[[ShardObject], bool]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ahead)
                wanted = self._ahead.pop(0)
            # What fails here fails again, and is told, where it is needed.
            with contextlib.suppress(Exception):
                fetch(wanted)


def _raise_first(running: list[Future[None]]) -> None:
    """Wait for all; at the first failure drop those that have not begun, wait for the others, raise it."""
    done, rest = wait(running, return_when=FIRST_EXCEPTION)
    for future in rest:
        future.cancel()
    wait(rest)
    for future in done:
        future.result()
