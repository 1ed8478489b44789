"""Reading objects over a network: one small interface, two clients behind it, the same retries around both.

    read / read_range / size / list_keys ─▶ one attempt by the client ─▶ passing fault? wait (doubling, jittered), again
                                                                     └▶ anything else: one clear error, named by key

`FsspecTransport` works for every fsspec URL. `ObstoreTransport` reads `s3://` with obstore where that is installed:
less processor time per byte (benchmarks/results/remote.txt). Clients are built where they are first used, one per
process, and neither they nor any credentials are ever pickled: what travels is the URL. After a fork a process builds
its own; obstore's runtime does not survive a fork, so a forked child of a process that used it reads through fsspec.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import re
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import fsspec
import fsspec.config
import numpy as np
from numpy.typing import NDArray

from tubelet_store.errors import StoreUnreachable, TubeletError

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
TransportName = Literal["auto", "fsspec", "obstore"]
Fault = Literal["passing", "expired", "denied", "missing", "other"]

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
_READ_BYTES = 16 << 20
# New credentials are looked for this often per read before the user is asked.
_RENEWALS = 2

_PASSING = {
    *("408", "409", "429", "500", "502", "503", "504"),
    *("ConditionalRequestConflict", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable"),
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
}
_MISSING = {"404", "NoSuchBucket", "NoSuchKey"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
# By class name, so that botocore is not imported where nobody uses it.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "NoAuthTokenError"),
}
# What these packages raise without a code is a request that did not get through.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "obstore", "urllib3")

# Settings of fsspec's `s3` section that obstore can be given; with any other, fsspec reads.
_KNOWN_SETTINGS = {"anon", "endpoint_url", "key", "secret", "token", "profile", "client_kwargs"}


@dataclass(frozen=True)
class Patience:
    """How long one read is tried."""

    attempts: int = 8
    """Requests per read, the first included; AWS_MAX_ATTEMPTS in the environment may lower it."""
    timeout_s: float = 30.0
    """Silence after which a request counts as stalled and is made again."""

    @property
    def requests(self) -> int:
        """Requests per read that the environment allows."""
        allowed = os.environ.get("AWS_MAX_ATTEMPTS", "")
        return min(self.attempts, int(allowed)) if allowed.isdigit() and int(allowed) else self.attempts


class PerProcess(Generic[T]):
    """A value built on first use in each process, anew in a forked child.

    Args:
        build: Makes the value.
    """

    _alive: ClassVar[weakref.WeakSet[PerProcess[Any]]] = weakref.WeakSet()

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        # The parent's stays in a forked child: to end a client whose threads are not there may wait for ever.
        self._made: dict[int, T] = {}
        self._lock = threading.Lock()
        PerProcess._alive.add(self)

    def __call__(self) -> T:
        """This process's value."""
        with self._lock:
            if os.getpid() not in self._made:
                self._made[os.getpid()] = self._build()
            return self._made[os.getpid()]

    def forget(self) -> None:
        """Build the value again on its next use."""
        with self._lock:
            self._made.pop(os.getpid(), None)

    @classmethod
    def after_fork(cls) -> None:
        """In the child: whatever thread held a lock is not here."""
        for each in cls._alive:
            each._lock = threading.Lock()


os.register_at_fork(after_in_child=PerProcess.after_fork)


class NoAccess(TubeletError):
    """The object storage refuses the credentials."""


class _ShortRead(Exception):
    """Fewer bytes came than were asked for."""


class Transport(ABC):
    """Reads the objects below one URL, by key.

    Every read is tried again after faults that pass (500, 503, 409, 429, timeouts, resets, bodies cut short), and with
    fresh credentials after they expired.

    Args:
        url: Where the objects lie.
        patience: How often and how long to try.
    """

    name: ClassVar[str]

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self.patience = patience or Patience()

    def __reduce__(self) -> tuple[type[Transport], tuple[str, Patience]]:
        return (type(self), (self.url, self.patience))

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError, or TubeletError where it cannot be had."""
        return self._patiently(key, lambda: self._read(key))

    def read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the object, read-only. Raises as `read` does."""

        def attempt() -> NDArray[np.uint8]:
            data = self._read_range(key, start, stop)
            if len(data) != stop - start:
                raise _ShortRead(f"{len(data)} of {stop - start} bytes came")
            return data

        return self._patiently(key, attempt)

    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""
        try:
            return self._patiently(key, lambda: self._size(key))
        except FileNotFoundError:
            return None

    def list_keys(self, prefix: str = "") -> list[str]:
        """Keys below `prefix` (a folder), sorted."""
        try:
            return sorted(self._patiently(prefix, lambda: self._list(prefix)))
        except FileNotFoundError:
            return []

    @abstractmethod
    def _read(self, key: str) -> bytes: ...

    @abstractmethod
    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _size(self, key: str) -> int: ...

    @abstractmethod
    def _list(self, prefix: str) -> list[str]: ...

    @abstractmethod
    def _renew(self) -> None:
        """Build the client again, so that it looks for credentials again."""

    def _patiently(self, key: str, attempt: Callable[[], T]) -> T:
        renewals = 0
        for number in range(1, self.patience.requests + 1):
            try:
                return attempt()
            except TubeletError:
                raise
            except Exception as error:
                fault = fault_of(error)
                if fault == "missing":
                    raise FileNotFoundError(f"{self.url}/{key}") from error
                if fault == "other":
                    raise
                renewals += fault == "expired"
                last = number == self.patience.requests
                if fault == "denied" or last or renewals > _RENEWALS:
                    raise self._explained(key, fault, error, number) from error
                if fault == "expired":
                    self._renew()
            # Full jitter: processes that were refused together must not come back together.
            time.sleep(random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**number)))
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, key: str, fault: Fault, error: Exception, attempts: int) -> TubeletError:
        name, detail = f"{self.url}/{key}".rstrip("/"), _detail(error)
        if fault == "expired":
            return NoAccess(
                f"{name}: the credentials have expired",
                "Get new ones (a new session token in the environment, or log in to the profile again) and run the same"
                " command again; what has arrived is kept",
            )
        if fault == "denied":
            remedy = "Check the credentials (environment, profile or role) and their rights"
            return NoAccess(f"No access to {name}: {detail}", remedy)
        return StoreUnreachable(
            f"{name} cannot be reached ({attempts} attempts): {detail}",
            "Check the endpoint, the network and the credentials, and run the same command again",
        )


class FsspecTransport(Transport):
    """Reads through fsspec: any URL it has a filesystem for, `s3://` through s3fs."""

    name = "fsspec"

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        super().__init__(url, patience)
        self._base = fsspec.core.strip_protocol(self.url)
        self._files: PerProcess[Any] = PerProcess(self._build)

    def _build(self) -> Any:
        options: dict[str, Any] = {"use_listings_cache": False}
        if s3 := self.url.startswith(("s3://", "s3a://")):
            timeout = self.patience.timeout_s
            # Retries are ours: those of three layers would multiply.
            ours = {"retries": {"total_max_attempts": 1}, "read_timeout": timeout, "connect_timeout": timeout}
            theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options |= {"config_kwargs": {"max_pool_connections": 64, **theirs, **ours}, "skip_instance_cache": True}
        files, _ = fsspec.core.url_to_fs(self.url, **options)
        if s3:
            files.retries = 1
        return files

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}".rstrip("/")

    def _read(self, key: str) -> bytes:
        return bytes(self._files().cat_file(self._path(key)))

    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        return np.frombuffer(bytes(self._files().cat_file(self._path(key), start=start, end=stop)), np.uint8)

    def _size(self, key: str) -> int:
        return int(self._files().size(self._path(key)))

    def _list(self, prefix: str) -> list[str]:
        return [path[len(self._base) + 1 :] for path in self._files().find(self._path(prefix))]

    def _renew(self) -> None:
        self._files.forget()


class ObstoreTransport(Transport):
    """Reads `s3://` through obstore, with botocore's idea of endpoint, region and credentials."""

    name = "obstore"

    # Its runtime's threads do not live on in a forked child, where every call would wait for them for ever.
    _runtime_of: ClassVar[int | None] = None

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        super().__init__(url, patience)
        self._store: PerProcess[S3Store] = PerProcess(self._build)

    @classmethod
    def can_read(cls, url: str) -> bool:
        """Whether obstore is installed, usable in this process, and can be given the settings of `url`."""
        return (
            url.startswith("s3://")
            and importlib.util.find_spec("obstore") is not None
            and importlib.util.find_spec("botocore") is not None
            and set(fsspec.config.conf.get("s3", {})) <= _KNOWN_SETTINGS
            and cls._runtime_of in (None, os.getpid())
        )

    def _build(self) -> S3Store:
        from obstore.store import S3Store

        if ObstoreTransport._runtime_of not in (None, os.getpid()):
            raise TubeletError(
                f"{self.url}: obstore was used before this process was forked, and does not work after",
                "Start processes with `spawn`, or set `transport: fsspec`",
            )
        ObstoreTransport._runtime_of = os.getpid()
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        settings = _S3Settings.found()
        return S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=settings.endpoint,
            region=settings.region,
            virtual_hosted_style_request=settings.endpoint.endswith(".amazonaws.com") and "." not in bucket,
            skip_signature=settings.credentials is None,
            credential_provider=settings.credentials,
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=self.patience.timeout_s),
                "timeout": timedelta(seconds=self.patience.timeout_s),
            },
            retry_config={"max_retries": 0},
        )

    def _read(self, key: str) -> bytes:
        import obstore

        # In parts, because obstore's timeout is for the whole of an answer, however long.
        size = self._size(key)
        starts = list(range(0, size, _READ_BYTES))
        stops = [min(start + _READ_BYTES, size) for start in starts]
        parts = obstore.get_ranges(self._store(), key, starts=starts, ends=stops, coalesce=0) if size else []
        data = b"".join(parts)
        if len(data) != size:
            raise _ShortRead(f"{len(data)} of {size} bytes came")
        return data

    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        import obstore

        return np.frombuffer(memoryview(obstore.get_range(self._store(), key, start=start, end=stop)), np.uint8)

    def _size(self, key: str) -> int:
        import obstore

        return int(obstore.head(self._store(), key)["size"])

    def _list(self, prefix: str) -> list[str]:
        import obstore

        return [str(found["path"]) for found in obstore.list(self._store(), prefix or None).collect()]

    def _renew(self) -> None:
        self._store.forget()


@dataclass(frozen=True)
class _S3Settings:
    """Where S3 is and how to sign, as botocore finds it (environment, profile, role) under fsspec's `s3` section."""

    endpoint: str
    region: str
    credentials: Callable[[], Any] | None
    """Gives obstore's credential dict; None: anonymous."""

    @classmethod
    def found(cls) -> _S3Settings:
        import botocore.exceptions
        import botocore.session

        given = fsspec.config.conf.get("s3", {})
        session = botocore.session.Session(profile=given.get("profile"))
        if given.get("key"):
            session.set_credentials(given["key"], given.get("secret"), given.get("token"))
        keywords = dict(given.get("client_kwargs", {}))
        if given.get("endpoint_url"):
            keywords["endpoint_url"] = given["endpoint_url"]
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", **{"region_name": region, **keywords})
        endpoint, region = client.meta.endpoint_url, client.meta.region_name
        if str(given.get("anon", "")).lower() in ("true", "1"):
            return cls(endpoint, region, None)
        credentials = session.get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError

        def current() -> dict[str, Any]:
            frozen = credentials.get_frozen_credentials()
            signing = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
            # botocore renews what can be renewed when asked; None would mean that obstore never asks again.
            soon = timedelta(minutes=5)
            return {**signing, "token": frozen.token, "expires_at": datetime.now(UTC) + soon}

        return cls(endpoint, region, current)


def open_transport(url: str, name: TransportName = "auto", patience: Patience | None = None) -> Transport:
    """The transport called `name` for `url`; `auto`: obstore where it can read `url`, else fsspec.

    Raises:
        TubeletError: obstore is asked for and cannot read `url`.
    """
    if name == "obstore" and not ObstoreTransport.can_read(url):
        raise TubeletError(
            f"{url} cannot be read with obstore here",
            "Use `transport: fsspec`; obstore needs s3://, `pip install obstore s3fs`, and processes that are spawned",
        )
    if name == "obstore" or (name == "auto" and ObstoreTransport.can_read(url)):
        return ObstoreTransport(url, patience)
    return FsspecTransport(url, patience)


def fault_of(error: BaseException) -> Fault:
    """What kind of failure `error`, as some client raised it, is."""
    codes: set[str] = set()
    kinds: list[BaseException] = list(_chain(error))
    for each in kinds:
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        elif type(each).__module__.startswith("obstore"):
            # obstore puts the answer into its message.
            codes |= set(re.findall(r"<Code>(\w+)</Code>", str(each)))
            codes |= set(re.findall(r"status(?: code)?:? (\d{3})", str(each), re.IGNORECASE))
    if codes & _EXPIRED:
        return "expired"
    if codes & _MISSING or any(isinstance(each, FileNotFoundError) for each in kinds):
        return "missing"
    if codes & _PASSING:
        return "passing"
    names = {type(each).__name__ for each in kinds}
    if codes & _DENIED or names & (_NO_CREDENTIALS | {"PermissionDeniedError", "UnauthenticatedError"}):
        return "denied"
    if any(isinstance(each, PermissionError) for each in kinds):
        return "denied"
    passing = (ConnectionError, TimeoutError, asyncio.TimeoutError, asyncio.IncompleteReadError, EOFError, _ShortRead)
    if any(isinstance(each, passing) or type(each).__module__.partition(".")[0] in _CLIENTS for each in kinds):
        return "passing"
    return "other"


def _detail(error: Exception) -> str:
    """What the server or the client said, on one line."""
    for each in _chain(error):
        if isinstance(response := getattr(each, "response", None), dict):
            answer = response.get("Error", {})
            return f"{answer.get('Code')} {answer.get('Message', '')}".strip()
    text = " ".join(str(error).split()) or type(error).__name__
    said = re.search(r"<Code>(.*?)</Code>.*?(?:<Message>(.*?)</Message>|$)", text)
    return " ".join(filter(None, said.groups())) if said else text[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
