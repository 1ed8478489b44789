"""The decode process: `python -m tubelet_pipeline.decode.process_main MEMFD PARENT_PID MEMORY_MB`.

    stdin   one JSON line per clip: uri, backend, sampling, view, first, more
    stdout  JSON lines: {"status": "ready"}, then per clip {"status": "using", …} and one of "ok", "failed"
    memfd   the frames of the last "ok", from byte 0

The process ends with its parent, stays below its memory and file-size limits, and sends the output of libraries to
stderr.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.decoders import decode
from tubelet_pipeline.frame_indices import FrameChoice, chosen_frames


@contextmanager
def local_path(uri: str) -> Iterator[str]:
    """Path of `uri` (a local path, `file://…` or any fsspec URL), valid inside the context.

    decord needs a path (it crashes on some files given as bytes), and FFmpeg must not open connections of its own. So a
    remote object is read whole, in one request, into an anonymous file, whose size RLIMIT_FSIZE bounds.

    Raises:
        DecodeFailure: `missing`, `fetch_failed`, `too_large`.
    """
    if "://" not in uri or uri.startswith("file://"):
        path = uri.removeprefix("file://")
        if not os.path.isfile(path):
            raise DecodeFailure("missing", f"{path} is not a file")
        yield path
        return
    import fsspec  # imported only for remote files: it takes half a second

    fd = os.memfd_create("video")
    path = f"/proc/self/fd/{fd}"
    # By default s3fs asks for the size first, and fetches large objects in many parallel requests.
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


_PR_SET_PDEATHSIG = 1


class FrameMemory:
    """The anonymous file shared with the parent; it grows to the largest clip so far."""

    def __init__(self, fd: int, limit_bytes: int) -> None:
        self.fd = fd
        self.limit_bytes = limit_bytes

    def allocate(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """uint8 array of `shape`, from byte 0 of the file on.

        Raises:
            DecodeFailure: `too_large`.
        """
        size_bytes = int(np.prod(shape))
        if size_bytes > self.limit_bytes:
            raise DecodeFailure(
                "too_large",
                f"{shape} is {size_bytes >> 20} MiB; the limit is {self.limit_bytes >> 20} (decode.memory_mb)",
            )
        if os.fstat(self.fd).st_size < size_bytes:
            os.ftruncate(self.fd, size_bytes)
        return np.frombuffer(mmap.mmap(self.fd, size_bytes), np.uint8).reshape(shape)


def main() -> None:
    """Serve requests until stdin closes."""
    memfd, parent_pid, memory_mb = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the line above
        return
    limit_bytes = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    # RLIMIT_DATA does not cover anonymous files: frames for the parent, and a remote object.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields) + "\n")

    memory = FrameMemory(memfd, limit_bytes)
    gc.freeze()
    reply(status="ready")
    for line in sys.stdin:
        try:
            reply(
                status="ok",
                **_header(_serve(json.loads(line), memory, lambda name: reply(status="using", decoder=name))),
            )
        except DecodeFailure as failure:
            reply(status="failed", code=failure.code, message=failure.message)
        except MemoryError as error:
            reply(status="failed", code="memory", message=str(error) or f"more than {memory_mb} MiB (decode.memory_mb)")
        except Exception as error:
            reply(status="failed", code="internal", message=f"{type(error).__name__}: {error}")
        # PyAV's containers and streams form reference cycles that hold megabytes outside Python's accounting.
        gc.collect()


def _serve(request: dict[str, Any], memory: FrameMemory, announce: Callable[[str], None]) -> DecodedClip:
    def choose(video_frames: int) -> FrameChoice:
        return chosen_frames(request["sampling"], video_frames, request["view"], request["first"], request["more"])

    with local_path(request["uri"]) as path:
        return decode(path, request["backend"], choose, memory.allocate, announce)


def _header(clip: DecodedClip) -> dict[str, Any]:
    fields = dict(vars(clip))
    return {
        **fields,
        "frames": clip.frames.shape,
        "frame_indices": clip.frame_indices.tolist(),
        "timestamps_s": [None if np.isnan(t) else t for t in clip.timestamps_s.tolist()],
        "fps": None if np.isnan(clip.fps) else clip.fps,
    }


if __name__ == "__main__":
    main()
