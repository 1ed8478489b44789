"""Reading objects over a network: one small interface, two clients behind it, the same retries around both.

    read / read_range / size / list_keys ─▶ one attempt by the client ─▶ passing fault? wait (doubling, jittered), again
                                                                     └▶ anything else: one clear error, named by key

`FsspecTransport` works for every fsspec URL. `ObstoreTransport` reads `s3://` with obstore, where that is installed: less
processor time per byte (benchmarks/results/remote.txt). Clients are built where they are first used, one per process,
and neither they nor any credentials are ever pickled: what travels is the URL. After a fork a process builds its own;
obstore's runtime does not survive a fork, so a forked child of a process that used it reads through fsspec.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Buffer, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Generic, Literal, TypeVar

import fsspec
import fsspec.config

from tubelet_store.errors import TubeletError

T = TypeVar("T")
TransportName = Literal["auto", "fsspec", "obstore"]

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0

_PASSING = {
    *("408", "409", "429", "500", "502", "503", "504"),
    *("ConditionalRequestConflict", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable"),
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeTooSkewed"),
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
# By class name, so that botocore is not imported where nobody uses it.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "NoAuthTokenError"),
}
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "obstore", "urllib3")
_REMEDY = "Check the endpoint, the network and the credentials"

Fault = Literal["passing", "expired", "denied", "missing", "other"]


@dataclass(frozen=True)
class Patience:
    """How long a read is tried."""

    attempts: int = 8
    """Requests per read, the first included; AWS_MAX_ATTEMPTS in the environment lowers it."""
    timeout_s: float = 30.0
    """Silence after which a request counts as stalled."""

    @property
    def requests(self) -> int:
        """Requests per read that the environment allows."""
        allowed = os.environ.get("AWS_MAX_ATTEMPTS", "")
        return min(self.attempts, int(allowed)) if allowed.isdigit() and int(allowed) else self.attempts


class PerProcess(Generic[T]):
    """A value that is built on first use in each process, and built anew in a forked child.

    Args:
        build: Makes the value.
    """

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        self._made: tuple[int, T] | None = None
        self._lock = threading.Lock()
        _EVERY_LOCK.append(self)

    def __call__(self) -> T:
        """This process's value."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._build())
            return self._made[1]

    def forget(self) -> None:
        """Build the value again on its next use."""
        with self._lock:
            self._made = None

    def after_fork(self) -> None:
        """In a child: a thread that is not here any more may have held the lock."""
        self._lock = threading.Lock()
