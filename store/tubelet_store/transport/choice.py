"""Which client reads which URL."""

from __future__ import annotations

from typing import Literal

from tubelet_store.errors import TubeletError
from tubelet_store.transport.fsspec_client import FsspecTransport
from tubelet_store.transport.http_client import HttpTransport
from tubelet_store.transport.obstore_client import ObstoreTransport
from tubelet_store.transport.transport import Patience, Transport

TransportName = Literal["auto", "http", "obstore", "fsspec"]


def open_transport(url: str, name: TransportName = "auto", patience: Patience | None = None) -> Transport:
    """The transport called `name` for `url`; `auto`: the first of http, obstore and fsspec that can read it.

    Raises:
        TubeletError: one is asked for by name that cannot read `url`.
    """
    for client in (HttpTransport, ObstoreTransport):
        if name == client.name and not client.can_read(url):
            raise TubeletError(f"{url} cannot be read with {name} here", f"Use `transport: fsspec`; {_NEEDS[name]}")
        if name in ("auto", client.name) and client.can_read(url):
            return client(url, patience)
    return FsspecTransport(url, patience)


_NEEDS = {
    "http": "http needs s3://, `pip install s3fs`, and no HTTP proxy on the way",
    "obstore": "obstore needs s3://, `pip install obstore s3fs`, and processes that are spawned",
}
