"""Ranges of S3 objects over plain HTTP connections, signed by botocore: bytes go from the socket into one array.

    a connection that is idle, else a new one ─▶ signed GET with Range ─▶ read into the array ─▶ idle again

s3fs and obstore gather an answer from many small pieces; here nothing is gathered, and the interpreter lock is free
while the bytes come. All else (whole small objects, sizes, listings) goes through s3fs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import urllib.request
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tubelet_store.transport.faults import ShortRead
from tubelet_store.transport.fsspec_client import FsspecTransport
from tubelet_store.transport.per_process import PerProcess
from tubelet_store.transport.s3 import S3Settings, has_usual_settings
from tubelet_store.transport.transport import Patience

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# An answer that says what is wrong is short; of a longer one this much is read.
_ERROR_BYTES = 64 << 10


class HttpTransport(FsspecTransport):
    """Reads `s3://`, ranges over connections of its own, with botocore's idea of endpoint, region and credentials."""

    name = "http"

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        super().__init__(url, patience)
        self._client: PerProcess[_Client] = PerProcess(lambda: _Client(self.url, self.patience.timeout_s))

    @classmethod
    def can_read(cls, url: str) -> bool:
        """Whether this process can be given the settings of `url`, and reaches its server without a proxy."""
        return has_usual_settings(url) and not {"http", "https", "all"} & urllib.request.getproxies().keys()

    def _read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._client().read_range(key, start, stop)

    def _renew(self) -> None:
        super()._renew()
        self._client.forget()


class _Client:
    """Connections to the server that holds the objects below `url`, used again and again."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._settings = S3Settings.found(url)
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        self._idle: deque[http.client.HTTPConnection] = deque()

    def read_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the object."""
        import numpy as np

        with contextlib.ExitStack() as closing:
            connection, answer = self._answer(key, {"Range": f"bytes={start}-{stop - 1}"})
            # Whatever is left unread would be taken for the next answer.
            closing.callback(connection.close)
            if answer.status != http.client.PARTIAL_CONTENT:
                raise _refusal(answer)
            data = np.empty(stop - start, np.uint8)
            view, filled = data.data, 0
            while filled < len(view) and (count := answer.readinto(view[filled:])):
                filled += count
            if filled < len(view) or answer.read(1):
                raise ShortRead(f"another length than the {stop - start} bytes asked for came ({filled} were read)")
            closing.pop_all()
        self._idle.append(connection)
        return data

    def _answer(self, key: str, headers: dict[str, str]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        url = self._settings.url_of(key)
        where = urlsplit(url)
        while True:
            try:
                connection, is_new = self._idle.pop(), False
            except IndexError:
                connection, is_new = self._connection(where.netloc), True
            try:
                connection.request("GET", where.path, headers=self._signed(url, headers))
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # Servers end connections that were idle for long; that is no fault of this request.
                if is_new or isinstance(error, TimeoutError):
                    raise

    def _connection(self, netloc: str) -> http.client.HTTPConnection:
        if self._settings.endpoint.startswith("https://"):
            return http.client.HTTPSConnection(netloc, timeout=self._timeout_s, context=self._tls)
        return http.client.HTTPConnection(netloc, timeout=self._timeout_s)

    def _signed(self, url: str, headers: dict[str, str]) -> dict[str, str]:
        if self._settings.credentials is None:
            return headers
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("GET", url, headers=headers)
        S3SigV4Auth(self._settings.credentials.get_frozen_credentials(), "s3", self._settings.region).add_auth(request)
        return dict(request.headers.items())


def _refusal(answer: http.client.HTTPResponse) -> Exception:
    """What botocore would raise for `answer`, which is not the bytes asked for."""
    from botocore.exceptions import ClientError
    from botocore.parsers import RestXMLParser

    body = answer.read(_ERROR_BYTES)
    parts: dict[str, Any] = {"status_code": answer.status, "headers": dict(answer.headers), "body": body}
    parsed = RestXMLParser().parse(parts, None) if answer.status >= 300 else {"Error": {"Code": "NoRange"}}
    return ClientError(parsed, "GetObject")
