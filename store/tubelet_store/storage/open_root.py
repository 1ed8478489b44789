"""From a URL to the root that reads and writes below it."""

from __future__ import annotations

from pathlib import Path

from tubelet.errors import TubeletError
from tubelet_store.storage.local import LocalRoot
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.storage.remote import RemoteRoot
from tubelet_store.storage.s3 import split_anonymous


def open_root(url: str) -> ObjectRoot:
    """The root for `url`: a path, `file://...` or any scheme fsspec knows; `s3://anon@BUCKET/...` without credentials.

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
