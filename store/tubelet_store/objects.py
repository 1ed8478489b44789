"""Where the objects of a store lie: a local directory or any fsspec URL, behind one small interface.

An object is written once. Locally it is written under `.tmp/`, synced, then renamed or linked into place, so a reader
(or a power cut) sees the whole object or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from tubelet_store.errors import TubeletError
from tubelet_store.transport import PerProcess, open_transport
from tubelet_store.upload import Uploader

SCRATCH = ".tmp"
_OWNER = "owner.lock"
# What S3's own guidance calls a typical range request.
_CHUNK_BYTES = 8 << 20


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
        """Make the finished file, whose digest is given, the object, unless another writer's bytes lie there.

        Returns:
            False where they do (never under `exclusive`, where the root can lock): they are left as they are.
        """

    @abstractmethod
    def settle(self, key: str, data: bytes) -> bytes:
        """Write the object beside a deposited one: over an older one under `exclusive`, else unless it exists.

        Returns:
            What lies there now.
        """

    @abstractmethod
    def probe_create(self) -> bool:
        """Whether `create` keeps two writers apart here; warns where it does not."""

    @abstractmethod
    def exclusive(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock `name` among the writers of this root, where the root can lock; freed if its holder dies."""

    @abstractmethod
    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A fresh local directory for unfinished files, removed on leaving."""

    @abstractmethod
    def discard_scratch(self) -> None:
        """Remove what dead writers left unfinished; living writers keep theirs."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Path to memory-map, None where the root is remote."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room left, None where that cannot be known."""


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
            while chunk := file.read(_CHUNK_BYTES):
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
        found = []
        for folder, below, names in os.walk(self.directory / prefix):
            if SCRATCH in below:
                below.remove(SCRATCH)
            found += [(Path(folder) / name).relative_to(self.directory).as_posix() for name in names]
        return sorted(found)

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
            synchronise(target.parent)
        return True

    def publish(self, key: str, finished: Path) -> None:
        """See ObjectRoot."""
        self._rename(finished, key)

    def deposit(self, key: str, finished: Path, sha256: str) -> bool:  # noqa: ARG002
        """See ObjectRoot. Without a record, what lies there is a dead writer's."""
        self._rename(finished, key)
        return True

    def settle(self, key: str, data: bytes) -> bytes:
        """See ObjectRoot."""
        self.replace(key, data)
        return data

    def probe_create(self) -> bool:
        """See ObjectRoot. A hard link is created once."""
        return True

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """See ObjectRoot."""
        folder = self.directory / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            yield

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """See ObjectRoot. A lock held inside tells that the owner lives."""
        with contextlib.ExitStack() as lock:
            folder = self._owned_folder(lock)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _owned_folder(self, lock: contextlib.ExitStack) -> Path:
        while True:
            folder = self.directory / SCRATCH / uuid.uuid4().hex
            # Until its lock is held, `discard_scratch` may take it for a dead writer's.
            with contextlib.suppress(FileNotFoundError):
                folder.mkdir(parents=True)
                lock.enter_context(_locked(folder / _OWNER))
                return folder

    def discard_scratch(self) -> None:
        """See ObjectRoot."""
        scratch = self.directory / SCRATCH
        for lock in [*scratch.glob(f"*/{_OWNER}"), *scratch.glob("*.lock")]:
            with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(lock, wait=False):
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
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path

    def _rename(self, finished: Path, key: str) -> None:
        target = self.directory / key
        target.parent.mkdir(parents=True, exist_ok=True)
        finished.replace(target)
        synchronise(target.parent)


class RemoteRoot(ObjectRoot):
    """Objects below an fsspec URL (`s3://bucket/prefix`, `memory://name`, ...).

    Reads go through a `Transport`, writes through fsspec. Clients are built where they are used and never travel: their
    pickles would carry the credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # A listing cache would hide what other writers add.
        self._files = PerProcess(lambda: fsspec.core.url_to_fs(self.url, use_listings_cache=False))
        with _reaching(self.url):
            _, self._base = self._files()
        self._transport = PerProcess(lambda: open_transport(self.url))
        self._uploader = Uploader(self.url)

    def __reduce__(self) -> tuple[type[RemoteRoot], tuple[str]]:
        return (RemoteRoot, (self.url,))

    @property
    def _fs(self) -> Any:
        return self._files()[0]

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def read(self, key: str) -> bytes:
        """See ObjectRoot."""
        return self._transport().read(key)

    def chunks(self, key: str) -> Iterator[bytes]:
        """See ObjectRoot."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        for start in range(0, size, _CHUNK_BYTES):
            yield self._transport().read_range(key, start, min(start + _CHUNK_BYTES, size)).tobytes()

    def size(self, key: str) -> int | None:
        """See ObjectRoot."""
        return self._transport().size(key)

    def age_s(self, key: str) -> float | None:
        """See ObjectRoot."""
        try:
            with _reaching(self.url):
                return time.time() - float(self._fs.modified(self._path(key)).timestamp())
        except (FileNotFoundError, NotImplementedError):
            return None

    def delete(self, key: str) -> None:
        """See ObjectRoot."""
        with contextlib.suppress(FileNotFoundError), _reaching(self.url):
            self._fs.rm_file(self._path(key))

    def list_keys(self, prefix: str = "") -> list[str]:
        """See ObjectRoot."""
        return self._transport().list_keys(prefix)

    def replace(self, key: str, data: bytes) -> None:
        """See ObjectRoot."""
        with _reaching(self.url, writing=True):
            self._uploader.replace(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectRoot."""
        with _reaching(self.url, writing=True):
            return self._uploader.create(key, data)

    def publish(self, key: str, finished: Path) -> None:
        """See ObjectRoot."""
        with finished.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with _reaching(self.url, writing=True):
            self._uploader.put_file(key, finished, sha256, over=True)
        finished.unlink()

    def deposit(self, key: str, finished: Path, sha256: str) -> bool:
        """See ObjectRoot."""
        with _reaching(self.url, writing=True):
            return self._uploader.put_file(key, finished, sha256)

    def settle(self, key: str, data: bytes) -> bytes:
        """See ObjectRoot."""
        return data if self.create(key, data) else self.read(key)

    def probe_create(self) -> bool:
        """See ObjectRoot."""
        with _reaching(self.url, writing=True):
            return self._uploader.probe_create()

    def exclusive(self, name: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """See ObjectRoot. Object storage has no locks; the commit record's create-only write decides there."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """See ObjectRoot."""
        with tempfile.TemporaryDirectory(prefix="tubelet-") as folder:
            yield Path(folder)

    def discard_scratch(self) -> None:
        """See ObjectRoot."""

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002
        """See ObjectRoot."""
        return None

    def free_bytes(self) -> int | None:
        """See ObjectRoot."""
        return None


def open_root(url: str) -> ObjectRoot:
    """The root for `url`: a path, `file://...` or any scheme fsspec knows.

    Raises:
        TubeletError: no filesystem is known (or installed) for the scheme, or the URL names no bucket or folder.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalRoot(Path(url).expanduser())
    if scheme == "file":
        return LocalRoot(Path(rest))
    if "@" in rest.partition("/")[0]:
        raise TubeletError(
            f"A {scheme}:// URL holds credentials before '@'; they would be stored and logged with it",
            "Put them into the environment or a profile, and leave them out of the URL",
        )
    if not rest.strip("/"):
        raise TubeletError(f"{url} names no bucket", f"Write {scheme}://BUCKET/NAME.zarr")
    try:
        return RemoteRoot(url)
    except ImportError as error:
        raise TubeletError(f"No filesystem for {url}: {error}", "Install the package it names") from error
    except ValueError as error:
        raise TubeletError(
            f"No filesystem for {url}: {error}", "Use a path, s3://..., or another fsspec URL"
        ) from error


@contextlib.contextmanager
def _reaching(url: str, writing: bool = False) -> Iterator[None]:
    """Turn what a remote filesystem raises into one line; FileNotFoundError and FileExistsError mean keys, and pass."""
    try:
        yield
    except FileNotFoundError as error:
        if not writing:
            raise
        raise TubeletError(f"{url} cannot be written: {error}", "Create the bucket, or check its name") from error
    except PermissionError as error:
        raise TubeletError(
            f"No access to {url}: {error}", "Check the credentials (environment, profile or role) and their rights"
        ) from error
    except Exception as error:
        # Named by module: what clients raise when no request got through, without importing them here.
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        raise TubeletError(
            f"{url} cannot be reached: {error}", "Check the endpoint, the network and the credentials"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    # The kernel frees the lock when its holder dies, by kill -9 too.
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it may have removed the file: a lock on what has no name any more excludes nobody.
            if not os.fstat(file.fileno()).st_nlink:
                continue
            yield
            return


def synchronise(path: Path) -> None:
    """Make the file's bytes, or the directory's names, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
