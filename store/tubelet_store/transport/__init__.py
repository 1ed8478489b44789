"""Reading objects over a network: one small interface, three clients behind it, the same retries around all of them.

    read / read_range / size / list_keys ─▶ one attempt by the client ─▶ passing fault? wait (doubling, jittered), again
                                                                     └▶ anything else: one clear error, named by key

`FsspecTransport` works for every fsspec URL. `HttpTransport` reads ranges of `s3://` over plain connections signed by
botocore, with the least processor time per byte (benchmarks/results/remote.txt); `ObstoreTransport` reads `s3://` with
obstore where that is installed, behind an HTTP proxy too. Clients are built where they are first used, one per process,
and neither they nor any credentials are ever pickled: what travels is the URL. After a fork a process builds its own;
obstore's runtime does not survive a fork, so a forked child of a process that used it reads with another client.
"""

from tubelet_store.transport.choice import TransportName, open_transport
from tubelet_store.transport.fsspec_client import FsspecTransport
from tubelet_store.transport.http_client import HttpTransport
from tubelet_store.transport.obstore_client import ObstoreTransport
from tubelet_store.transport.per_process import PerProcess
from tubelet_store.transport.transport import NoAccess, Patience, Transport

__all__ = [
    "FsspecTransport",
    "HttpTransport",
    "NoAccess",
    "ObstoreTransport",
    "Patience",
    "PerProcess",
    "Transport",
    "TransportName",
    "open_transport",
]
