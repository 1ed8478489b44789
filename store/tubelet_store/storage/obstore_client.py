"""obstore: S3 through a client written in Rust."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from tubelet.concurrency import PerProcess
from tubelet.errors import TubeletError
from tubelet_store.storage.client import Client, RetryPolicy
from tubelet_store.storage.faults import Replaced, ShortRead
from tubelet_store.storage.s3 import S3Settings, has_usual_settings

if TYPE_CHECKING:
    import numpy as np
    from botocore.credentials import Credentials
    from numpy.typing import NDArray
    from obstore import ObjectMeta
    from obstore.store import S3Store

_READ_BYTES = 16 << 20


class ObstoreClient(Client):
    """Reads `s3://` through obstore, with botocore's idea of endpoint, region and credentials."""

    name = "obstore"

    # Its runtime's threads do not exist in a forked child, where every call would wait for them without end.
    _runtime_of: ClassVar[int | None] = None

    def __init__(self, url: str, retries: RetryPolicy | None = None) -> None:
        super().__init__(url, retries)
        self._store: PerProcess[S3Store] = PerProcess(self._build)

    @classmethod
    def can_read(cls, url: str) -> bool:
        """Whether obstore is installed, usable in this process, and can be given the settings of `url`."""
        return (
            importlib.util.find_spec("obstore") is not None
            and has_usual_settings(url)
            and cls._runtime_of in (None, os.getpid())
        )

    def _build(self) -> S3Store:
        from obstore.store import S3Store

        if ObstoreClient._runtime_of not in (None, os.getpid()):
            raise TubeletError(
                f"{self.url}: obstore was used before this process was forked, and does not work after",
                "Start processes with `spawn`, or set `client: fsspec`",
            )
        ObstoreClient._runtime_of = os.getpid()
        settings = S3Settings.from_environment(self.url)
        return S3Store(
            settings.bucket,
            prefix=settings.prefix or None,
            endpoint=settings.endpoint,
            region=settings.region,
            virtual_hosted_style_request=settings.names_bucket_in_host,
            skip_signature=settings.credentials is None,
            credential_provider=None if settings.credentials is None else _provider(settings.credentials),
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=self.retries.timeout_s),
                "timeout": timedelta(seconds=self.retries.timeout_s),
            },
            retry_config={"max_retries": 0},
        )

    def _read(self, key: str) -> bytes:
        import obstore

        answer = obstore.get(self._store(), key)
        size = answer.meta["size"]
        if size <= _READ_BYTES:
            data = bytes(answer.bytes())
        else:
            # In parts, because obstore's timeout is for the whole of an answer, however long.
            parts = [(start, min(start + _READ_BYTES, size)) for start in range(0, size, _READ_BYTES)]
            data = b"".join(self._part(key, part, answer.meta) for part in parts)
        if len(data) != size:
            raise ShortRead(f"{len(data)} of {size} bytes came")
        return data

    def _part(self, key: str, part: tuple[int, int], of: ObjectMeta) -> bytes:
        import obstore

        answer = obstore.get(self._store(), key, options={"range": part})
        if _version(answer.meta) != _version(of):
            raise Replaced("it was replaced while it was read")
        return bytes(answer.bytes())

    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        import numpy as np
        import obstore

        return np.frombuffer(memoryview(obstore.get_range(self._store(), key, start=start, end=stop)), np.uint8)

    def _size(self, key: str) -> int:
        import obstore

        return int(obstore.head(self._store(), key)["size"])

    def _list(self, prefix: str) -> list[str]:
        import obstore

        return [str(listed["path"]) for listed in obstore.list(self._store(), prefix or None).collect()]

    def _renew(self) -> None:
        self._store.forget()


def _version(meta: ObjectMeta) -> tuple[str | None, datetime, int]:
    """What differs between an object and another one of the same name."""
    return meta["e_tag"], meta["last_modified"], meta["size"]


def _provider(credentials: Credentials) -> Callable[[], Any]:
    """A credential callback for obstore."""

    def current() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        signing = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        # botocore renews expired credentials on access; with None, obstore would never call again.
        soon = timedelta(minutes=5)
        return {**signing, "token": frozen.token, "expires_at": datetime.now(UTC) + soon}

    return current
