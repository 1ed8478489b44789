"""Objects below an fsspec URL."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from tubelet.concurrency import PerProcess
from tubelet.errors import TubeletError
from tubelet_store.storage.client import Client, ClientName, RetryPolicy
from tubelet_store.storage.fsspec_client import FsspecClient
from tubelet_store.storage.object_root import CHUNK_BYTES, ObjectRoot
from tubelet_store.storage.obstore_client import ObstoreClient
from tubelet_store.storage.s3 import split_anonymous
from tubelet_store.storage.upload import Uploader


class RemoteRoot(ObjectRoot):
    """Objects below an fsspec URL (`s3://bucket/prefix`, `memory://name`, ...).

    Reads go through a `Client`, writes through fsspec. Clients are built where they are used and never pickled: their
    pickles would carry the credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        plain, anonymous = split_anonymous(self.url)
        # A listing cache would hide what other writers add.
        options = {"use_listings_cache": False, **({"anon": True} if anonymous else {})}
        self._files = PerProcess(lambda: fsspec.core.url_to_fs(plain, **options))
        with _reaching(self.url):
            _, self._base = self._files()
        self._client = PerProcess(lambda: open_client(self.url))
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
        return self._client().read(key)

    def chunks(self, key: str) -> Iterator[bytes]:
        """See ObjectRoot."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        for start in range(0, size, CHUNK_BYTES):
            yield self._client().read_range(key, start, min(start + CHUNK_BYTES, size)).tobytes()

    def size(self, key: str) -> int | None:
        """See ObjectRoot."""
        return self._client().size(key)

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
        return self._client().list_keys(prefix)

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


def open_client(url: str, name: ClientName = "auto", retries: RetryPolicy | None = None) -> Client:
    """The client called `name` for `url`; `auto`: obstore where it can read it, else fsspec.

    Raises:
        TubeletError: obstore is asked for by name and cannot read `url`.
    """
    if name != "fsspec" and ObstoreClient.can_read(url):
        return ObstoreClient(url, retries)
    if name == "obstore":
        raise TubeletError(
            f"{url} cannot be read with obstore here",
            "Use `client: fsspec`; obstore needs s3://, `pip install obstore s3fs`, and processes that are spawned",
        )
    return FsspecClient(url, retries)


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
