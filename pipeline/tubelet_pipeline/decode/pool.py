"""Clips in order from several decode processes, a bounded number ahead of the reader.

    requests ─▶ queue ─▶ thread with its child process (x processes) ─▶ futures in order ─▶ reader

A clip that crashes or stalls its process fails; the other clips are not affected. Works in daemonic processes and from
any thread.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from tubelet.errors import TubeletError
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.process import ChildProcess, DecodeConfig
from tubelet_pipeline.sampling import DenseSampling, UniformSampling


@dataclass(frozen=True)
class DecodeRequest:
    """One clip to decode.

    Attributes:
        uri: Local path, or any URL fsspec reads.
        sampling: Which frames.
        view: Temporal view, in range(sampling.clips).
        first, more: The frames from `first` on, of a window that is `more` frames longer (shifted views).
    """

    uri: str
    sampling: DenseSampling | UniformSampling
    view: int = 0
    first: int = 0
    more: int = 0


# Optional decoders, and the remedy if they are not installed.
_OPTIONAL = {
    "decord": "pip install 'tubelet[pipeline]', or set decode.backend=pyav where decord has no wheel",
    "torchcodec": "pip install 'tubelet[torchcodec]', or set decode.backend=auto",
}

Result = DecodedClip | DecodeFailure
_Task = tuple[DecodeRequest, "Future[Result]"]


class DecodePool:
    """Several decode processes. Each is owned by one thread, which starts it, sends it requests and reaps it.

    Args:
        config: Decoder, number of processes, limits.

    Raises:
        TubeletError: decoding is not supported on this platform, or a package is missing.
    """

    def __init__(self, config: DecodeConfig) -> None:
        if sys.platform != "linux":
            raise TubeletError(f"Decoding needs Linux; this is {sys.platform}", "Run extraction in a Linux container")
        for library in dict.fromkeys(["av", config.backend if config.backend in _OPTIONAL else "av"]):
            if importlib.util.find_spec(library) is None:
                raise TubeletError(
                    f"Decoding with backend '{config.backend}' needs the package {library}, which is not installed",
                    _OPTIONAL.get(library, "pip install 'tubelet[pipeline]'"),
                )
        if config.backend == "torchcodec":
            _check_torchcodec()
        self.config = config
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._closing = threading.Lock()
        self._children = [ChildProcess(config) for _ in range(config.processes)]
        # Daemon threads: a worker that exits without closing the pool does not wait; the kernel kills the children.
        self._owners = [
            threading.Thread(target=self._serve, args=(child,), name=f"decode-{i}", daemon=True)
            for i, child in enumerate(self._children)
        ]
        for owner in self._owners:
            owner.start()

    def map_ordered(self, requests: Iterable[DecodeRequest], prefetch: int) -> Iterator[Result]:
        """Results in the order of `requests`, which is read lazily.

        At most `prefetch` decoded clips exist at a time, including the one just yielded. A bad clip is yielded as a
        `DecodeFailure`, not raised.

        Raises:
            TubeletError: no decode process can be started.
            RuntimeError: the pool is closed before or during the iteration.
        """
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least 1 clip must be in flight")
        waiting: deque[Future[Result]] = deque()
        source = iter(requests)
        try:
            exhausted = False
            while not exhausted or waiting:
                while not exhausted and len(waiting) < prefetch:
                    request = next(source, None)
                    exhausted = request is None
                    if request is not None:
                        waiting.append(self._submit(request))
                if waiting:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Kill the processes and wait for their threads; clips in progress are discarded."""
        with self._closing:  # no task may be queued after the last None
            self._closed.set()
            for _ in self._owners:
                self._tasks.put(None)
        for owner, child in zip(self._owners, self._children, strict=True):
            # The owner may have restarted its child since the last kill.
            while owner.is_alive():
                child.kill()
                owner.join(0.05)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, request: DecodeRequest) -> Future[Result]:
        future: Future[Result] = Future()
        with self._closing:
            if self._closed.is_set():
                raise _closed_error()
            self._tasks.put((request, future))
        return future

    def _serve(self, child: ChildProcess) -> None:
        try:
            with contextlib.suppress(TubeletError):  # raised again for the first clip
                child.start()
            while (task := self._tasks.get()) is not None:
                request, future = task
                if self._closed.is_set():
                    future.set_exception(_closed_error())
                elif future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._decode(child, request))
                    except Exception as error:
                        future.set_exception(error)
                del task, future  # an idle thread must not keep the last clip alive
        finally:
            child.close()

    def _decode(self, child: ChildProcess, request: DecodeRequest) -> Result:
        line = {
            "uri": request.uri,
            "backend": self.config.backend,
            "sampling": request.sampling.model_dump(mode="json"),
            "view": request.view,
            "first": request.first,
            "more": request.more,
        }
        try:
            return child.decode(line)
        except DecodeFailure as failure:
            if self._closed.is_set():
                # The pool killed the process: this is no fault of the video.
                raise _closed_error() from failure
            if child.using in ("", "pyav"):
                return failure
        # The optional decoder crashed the process: try PyAV in a new one.
        try:
            return child.decode({**line, "backend": "pyav"})
        except DecodeFailure as failure:
            if self._closed.is_set():
                raise _closed_error() from failure
            return failure


def _check_torchcodec() -> None:
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:  # it ships no FFmpeg, and is built for one version of torch
        raise TubeletError(
            f"torchcodec is installed but does not load: {' '.join(str(error).split())[:200]}",
            "Install FFmpeg's shared libraries (`apt-get install ffmpeg`) and the version of torchcodec made for this "
            "torch, or set decode.backend=auto",
        ) from error


def _closed_error() -> RuntimeError:
    return RuntimeError("This decode pool is closed")
