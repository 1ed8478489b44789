"""The client for every URL: fsspec.

NumPy is imported where a range is read: a verb that reads a catalog needs none, and it takes a third of its start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec
import fsspec.config

from tubelet.concurrency import PerProcess
from tubelet_store.storage.client import Client, RetryPolicy
from tubelet_store.storage.s3 import is_s3, split_anonymous

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FsspecClient(Client):
    """Reads through fsspec: any URL it has a filesystem for, `s3://` through s3fs."""

    name = "fsspec"

    def __init__(self, url: str, retries: RetryPolicy | None = None) -> None:
        super().__init__(url, retries)
        self._plain, self._anonymous = split_anonymous(self.url)
        self._base = fsspec.core.strip_protocol(self._plain)
        self._files: PerProcess[Any] = PerProcess(self._build)

    def _build(self) -> Any:
        options: dict[str, Any] = {"use_listings_cache": False}
        if s3 := is_s3(self.url):
            timeout = self.retries.timeout_s
            # Only `Client` retries: retries of three layers would multiply.
            fixed = {"retries": {"total_max_attempts": 1}, "read_timeout": timeout, "connect_timeout": timeout}
            configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options |= {
                "config_kwargs": {"max_pool_connections": 64, **configured, **fixed},
                "skip_instance_cache": True,
            }
            options |= {"anon": True} if self._anonymous else {}
        files, _ = fsspec.core.url_to_fs(self._plain, **options)
        if s3:
            files.retries = 1
        return files

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}".rstrip("/")

    def _read(self, key: str) -> bytes:
        return bytes(self._files().cat_file(self._path(key)))

    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        import numpy as np

        files = self._files()
        # What fsspec reads through its buffered files (the Hub, say) would be read ahead, and thrown away.
        buffered = not files.async_impl and type(files).cat_file is fsspec.AbstractFileSystem.cat_file
        exact = {"cache_type": "none"} if buffered else {}
        return np.frombuffer(bytes(files.cat_file(self._path(key), start=start, end=stop, **exact)), np.uint8)

    def _size(self, key: str) -> int:
        return int(self._files().size(self._path(key)))

    def _list(self, prefix: str) -> list[str]:
        return [path[len(self._base) + 1 :] for path in self._files().find(self._path(prefix))]

    def _renew(self) -> None:
        self._files.forget()
