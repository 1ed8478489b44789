"""The interface to objects over a network, with the retries that every client shares."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from tubelet.errors import StoreUnreachable, TubeletError
from tubelet.retry import retry
from tubelet_store.storage.faults import Fault, ShortRead, detail, fault_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

ClientName = Literal["auto", "obstore", "fsspec"]

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 10.0
# Credentials are renewed at most this often per read; then the read fails.
_RENEWALS = 2


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a request is tried."""

    attempts: int = 8
    """Requests per read, the first included; AWS_MAX_ATTEMPTS in the environment may lower it."""
    timeout_s: float = 30.0
    """Seconds without data after which a request is repeated."""

    @property
    def requests(self) -> int:
        """Requests per read that the environment allows."""
        allowed = os.environ.get("AWS_MAX_ATTEMPTS", "")
        return min(self.attempts, int(allowed)) if allowed.isdigit() and int(allowed) else self.attempts


class NoAccess(TubeletError):
    """The object storage refuses the credentials."""


class Client(ABC):
    """Reads the objects below one URL, by key.

    Every read is tried again after faults that pass (500, 503, 409, 429, timeouts, resets, bodies cut short), and with
    fresh credentials after they expired.

    Args:
        url: Location of the objects.
        retries: How often and how long to try.
    """

    name: ClassVar[str]

    def __init__(self, url: str, retries: RetryPolicy | None = None) -> None:
        self.url = url.rstrip("/")
        self.retries = retries or RetryPolicy()

    def __reduce__(self) -> tuple[type[Client], tuple[str, RetryPolicy]]:
        return (type(self), (self.url, self.retries))

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError, or TubeletError where it cannot be had."""
        return self._retried(key, lambda: self._read(key))

    def read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the object, read-only. Raises as `read` does."""

        def attempt() -> NDArray[np.uint8]:
            data = self._read_range(key, start, stop)
            if len(data) != stop - start:
                raise ShortRead(f"{len(data)} of {stop - start} bytes came")
            return data

        return self._retried(key, attempt)

    def size(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""
        try:
            return self._retried(key, lambda: self._size(key))
        except FileNotFoundError:
            return None

    def list_keys(self, prefix: str = "") -> list[str]:
        """Keys below `prefix` (a folder), sorted."""
        try:
            return sorted(self._retried(prefix, lambda: self._list(prefix)))
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

    def _retried(self, key: str, attempt: Callable[[], T]) -> T:
        """`attempt()`, repeated after faults that pass, and with fresh credentials after they expired."""
        renewals = 0

        def may_retry(error: Exception, attempts: int) -> bool:
            nonlocal renewals
            if isinstance(error, TubeletError):
                return False
            fault = fault_of(error)
            if fault == "missing":
                raise FileNotFoundError(f"{self.url}/{key}") from error
            if fault == "other":
                return False
            renewals += fault == "expired"
            if fault == "denied" or attempts == self.retries.requests or renewals > _RENEWALS:
                raise self._explained(key, fault, error, attempts) from error
            if fault == "expired":
                self._renew()
            return True

        return retry(attempt, may_retry, _FIRST_WAIT_S, _LONGEST_WAIT_S)

    def _explained(self, key: str, fault: Fault, error: Exception, attempts: int) -> TubeletError:
        name, reason = f"{self.url}/{key}".rstrip("/"), detail(error)
        if fault == "expired":
            return NoAccess(
                f"{name}: the credentials have expired",
                "Get new ones (a new session token in the environment, or log in to the profile again) and run the same"
                " command again; what has arrived is kept",
            )
        if fault == "denied":
            remedy = "Check the credentials (environment, profile or role) and their rights"
            return NoAccess(f"No access to {name}: {reason}", remedy)
        return StoreUnreachable(
            f"{name} cannot be reached ({attempts} attempts): {reason}",
            "Check the endpoint, the network and the credentials, and run the same command again",
        )
