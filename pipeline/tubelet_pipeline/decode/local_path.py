"""A URI as something a decoder can open: a local path.

decord needs a path (it dies on some files given as bytes), and FFmpeg must not open connections of its own.
A remote object is read whole, in one request, piece by piece into an anonymous file, which the kernel lets grow no
larger than this process may write (RLIMIT_FSIZE).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tubelet_pipeline.decode.decoded_clip import DecodeFailure


@contextmanager
def local_path(uri: str) -> Iterator[str]:
    """Path of `uri` (a local path, `file://…` or any fsspec URL), valid inside the context.

    Raises:
        DecodeFailure: `missing`, `fetch_failed`, `too_large`.
    """
    if "://" not in uri or uri.startswith("file://"):
        path = uri.removeprefix("file://")
        if not os.path.isfile(path):
            raise DecodeFailure("missing", f"{path} is not a file")
        yield path
        return
    import fsspec  # half a second that local files need not pay

    fd = os.memfd_create("video")
    path = f"/proc/self/fd/{fd}"
    # s3fs would ask for the size first, and fetch large objects in many requests at once.
    options = {"max_concurrency": 1} if uri.startswith(("s3://", "s3a://")) else {}
    try:
        try:
            filesystem, key = fsspec.core.url_to_fs(uri, **options)
            filesystem.get_file(key, path)
        except FileNotFoundError as error:
            raise DecodeFailure("missing", f"no object {uri}") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EFBIG:
                raise DecodeFailure("too_large", f"{uri} is larger than decode.memory_mb") from error
            raise DecodeFailure("fetch_failed", f"{uri}: {type(error).__name__}: {error}") from error
        yield path
    finally:
        os.close(fd)
