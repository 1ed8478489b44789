"""Writing objects over a network: retried, create-only, checked on arrival.

    put ─▶ HEAD: equal digest there? adopt ─▶ create-only PUT (multipart when large) ─▶ HEAD: size and digest as sent?

The digest of a shard object is in its metadata, so the content at a key is known without reading it. Clients are
built where they are used; their credentials come from the environment, a profile or a role and go nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from tubelet.errors import StoreUnreachable, TubeletError
from tubelet_store.digest import digest_of
from tubelet_store.storage.client import RetryPolicy
from tubelet_store.storage.fsspec_client import FsspecClient
from tubelet_store.storage.s3 import is_s3

# Objects of twice this size and more go up in parts of it; four parts at a time stay in memory.
_PART_BYTES = 32 * 2**20
_PARTS_AT_ONCE = 4
_READ_BYTES = 8 * 2**20
_DIGEST = "tubelet-sha256"
_PROBE = ".tubelet-probe"
# Short: what a spool cannot bridge, the caller waits for.
_PATIENCE = RetryPolicy(attempts=5)

# Some servers do not say which condition failed; s3fs then gives a plain OSError.
_EXISTS = {"PreconditionFailed", "412"}
_NOT_IMPLEMENTED = {"NotImplemented", "501"}

_log = logging.getLogger("tubelet")


def part_count(size_bytes: int) -> int:
    """Requests that change the store, for one object: a PUT, or the parts with their beginning and end."""
    return 1 if size_bytes < 2 * _PART_BYTES else -(-size_bytes // _PART_BYTES) + 2


class Uploader(FsspecClient):
    """Writes the objects below one URL, and reads them, through fsspec.

    Args:
        url: Location of the objects.
        retries: How often and how long to try; AWS_MAX_ATTEMPTS in the environment may lower it.
    """

    def __init__(self, url: str, retries: RetryPolicy = _PATIENCE) -> None:
        super().__init__(url, retries)
        self._is_s3 = is_s3(self.url)
        self._conditional = True

    def replace(self, key: str, data: bytes) -> None:
        """Write the object whole, over an older one if there is one."""
        self._retried(key, lambda: self._files().pipe_file(self._path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists; False where it did."""
        return self._create(key, lambda mode: self._files().pipe_file(self._path(key), data, **mode))

    def put_file(self, key: str, path: Path, sha256: str, over: bool = False) -> bool:
        """Make the file's bytes the object, unless other bytes are there.

        Args:
            key: Of the object.
            path: Local file.
            sha256: Hex digest of the file.
            over: Overwrite an existing object.

        Returns:
            False where an object with other bytes exists; it is left unchanged.

        Raises:
            StoreUnreachable: every attempt failed or arrived damaged.
        """
        size = path.stat().st_size

        def put(mode: dict[str, str]) -> None:
            options = {"chunksize": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE, "Metadata": {_DIGEST: sha256}}
            self._files().put_file(str(path), self._path(key), **(options if self._is_s3 else {}), **mode)

        def arrived() -> bool | None:
            present_bytes = self.size(key)
            return None if present_bytes is None else present_bytes == size and self.digest(key) == sha256

        present = None if over else arrived()
        if present is not None:
            return present
        for _ in range(self.retries.requests):
            if over:
                self._retried(key, lambda: put({}))
            else:
                if not self._create(key, put):
                    return bool(arrived())
            if arrived():
                return True
            # Damaged although the request succeeded: the object is this writer's, so overwrite it.
            over = True
        raise StoreUnreachable(
            f"{self.url}/{key} arrived damaged {self.retries.requests} times", "Check the network and the storage"
        )

    def digest(self, key: str) -> str:
        """Hex SHA-256 of the object: from its metadata, else by reading it."""

        def look() -> str:
            stored = self._files().metadata(self._path(key)) if self._is_s3 else {}
            for name, value in stored.items():
                # s3fs gives names with hyphens or underscores, by version.
                if str(name).replace("_", "-") == _DIGEST:
                    return str(value)
            with self._files().open(self._path(key), "rb") as file:
                return digest_of(iter(lambda: file.read(_READ_BYTES), b"")).sha256

        return self._retried(key, look)

    def probe_create(self) -> bool:
        """Whether the server refuses to create what exists; tested by trying. Warns about a server that does not."""
        self.create(_PROBE, b"")
        honored = not self.create(_PROBE, b"") and self._conditional
        # Who may write but not delete leaves an empty object behind.
        with contextlib.suppress(PermissionError, TubeletError):
            self._retried(_PROBE, lambda: self._files().rm_file(self._path(_PROBE)))
        if not honored:
            _log.warning(
                "%s ignores conditional writes (If-None-Match): two jobs that write one store at once can overwrite "
                "each other. Run one at a time.",
                self.url,
            )
        return honored

    def _create(self, key: str, put: Callable[[dict[str, str]], object]) -> bool:
        def attempt() -> bool | None:
            try:
                put({"mode": "create"})
            except (OSError, ValueError) as error:
                if isinstance(error, FileExistsError) or _codes(error) & _EXISTS:
                    return False
                if _codes(error) & _NOT_IMPLEMENTED:
                    return None
                raise
            return True

        if self._conditional:
            created = self._retried(key, attempt)
            if created is not None:
                return created
            self._conditional = False
        if self.size(key) is not None:
            return False
        self._retried(key, lambda: put({}))
        return True


def _codes(error: BaseException | None) -> set[str]:
    """Codes the server gave, of `error` and what it was raised from."""
    codes = set()
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
        error = error.__cause__
    return codes
