"""Storage of objects below a URL: `ObjectRoot` with a local and a remote implementation. Get one from `open_root`.

An object appears whole or not at all.

    LocalRoot   files in a directory
    RemoteRoot  any fsspec URL: reads through a `Client` (fsspec or obstore), writes through an `Uploader`

A client retries requests after transient faults (exponential backoff with jitter); other faults become one error that
names the key.

`FsspecClient` works for every fsspec URL. `ObstoreClient` reads `s3://` where obstore is installed, at twice the
speed of s3fs and half its processor time (benchmarks/results/remote.txt; plain sockets signed by botocore were not
faster). Clients are built where they are first used, one per process, and neither they nor any credentials are ever
pickled: only the URL is. After a fork a process builds its own; obstore's runtime does not survive a fork, so a
forked child of a process that used it reads through fsspec.
"""

from __future__ import annotations

from pathlib import Path

from tubelet.errors import TubeletError
from tubelet_store.storage.local import LocalRoot
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.storage.remote import RemoteRoot
from tubelet_store.storage.s3 import split_anonymous


def open_root(url: str) -> ObjectRoot:
    """The root for `url`: a path, `file://...` or any scheme of fsspec; `s3://anon@BUCKET/...` without credentials.

    Raises:
        TubeletError: no filesystem is known (or installed) for the scheme, or the URL names no bucket or folder.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalRoot(Path(url).expanduser())
    if scheme == "file":
        return LocalRoot(Path(rest))
    plain, _ = split_anonymous(url)
    if "@" in plain.partition("://")[2].partition("/")[0]:
        raise TubeletError(
            f"A {scheme}:// URL holds credentials before '@'; they would be stored and logged with it",
            "Put them into the environment or a profile, and leave them out of the URL",
        )
    if not rest.strip("/"):
        raise TubeletError(f"{url} names no bucket", f"Write {scheme}://BUCKET/NAME.zarr")
    try:
        return RemoteRoot(url)
    except ImportError as error:
        raise TubeletError(f"No filesystem for {url}: {error}", "Install the package it names") from error
    except ValueError as error:
        raise TubeletError(
            f"No filesystem for {url}: {error}", "Use a path, s3://..., or another fsspec URL"
        ) from error
