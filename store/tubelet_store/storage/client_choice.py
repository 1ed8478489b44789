"""Which client reads which URL."""

from __future__ import annotations

from typing import Literal

from tubelet.errors import TubeletError
from tubelet_store.storage.client import Patience, Transport
from tubelet_store.storage.fsspec_client import FsspecTransport
from tubelet_store.storage.obstore_client import ObstoreTransport

TransportName = Literal["auto", "obstore", "fsspec"]


def open_transport(url: str, name: TransportName = "auto", patience: Patience | None = None) -> Transport:
    """The transport called `name` for `url`; `auto`: obstore where it can read it, else fsspec.

    Raises:
        TubeletError: obstore is asked for by name and cannot read `url`.
    """
    if name != "fsspec" and ObstoreTransport.can_read(url):
        return ObstoreTransport(url, patience)
    if name == "obstore":
        raise TubeletError(
            f"{url} cannot be read with obstore here",
            "Use `transport: fsspec`; obstore needs s3://, `pip install obstore s3fs`, and processes that are spawned",
        )
    return FsspecTransport(url, patience)
