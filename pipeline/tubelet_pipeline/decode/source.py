"""A URI as something a decoder can open: a local path.

decord needs a path (it dies on some files given as bytes), and FFmpeg must not open connections of its own.
A remote object is read whole, in one request, into an anonymous file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tubelet_pipeline.decode.clip import DecodeFailure


@contextmanager
def local_path(uri: str) -> Iterator[str]:
    """Path of `uri` (a local path, `file://…` or any fsspec URL), valid inside the context.

    Raises:
        DecodeFailure: `missing`, `fetch_failed`.
    """
    if "://" not in uri or uri.startswith("file://"):
        path = uri.removeprefix("file://")
        if not os.path.isfile(path):
            raise DecodeFailure("missing", f"{path} is not a file")
        yield path
        return
    import fsspec  # half a second that local files need not pay

    try:
        filesystem, key = fsspec.core.url_to_fs(uri)
        content = filesystem.cat_file(key)
    except FileNotFoundError as error:
        raise DecodeFailure("missing", f"no object {uri}") from error
    except Exception as error:
        raise DecodeFailure("fetch_failed", f"{uri}: {type(error).__name__}: {error}") from error
    fd = os.memfd_create("video")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        del content
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
