"""The parent's handle on one decode process: start it, send it requests with a deadline, kill it, start it again.

Uses plain `subprocess`, because Dask's workers are daemonic and may not have multiprocessing children. The process asks
the kernel to be killed when the *thread* that started it ends, so the thread that calls `decode` must be the one that
stays.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

import tubelet_pipeline
import tubelet_store
from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure


class DecodeConfig(Config):
    """Decoder, limits, and number of decode processes."""

    backend: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """All are exact. auto: the fastest by the project's benchmarks, which is PyAV. decord, torchcodec: used on files
    that they number correctly; PyAV for the others, and where they fail."""
    processes: int = Field(default=2, ge=1)
    """Decode processes per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit per clip, in seconds."""
    memory_mb: int = Field(default=2048, ge=128)
    """Limit in MiB of the private memory of a decode process (RLIMIT_DATA), of the frames of one clip, and of a remote
    video."""


_START_TIMEOUT_S = 120.0  # 0.3 s on an idle machine; imports from a busy network file system take far longer


class _Died(Exception):
    """The process ended."""


class _Late(Exception):
    """The deadline passed."""


class ChildProcess:
    """One decode process and the memory it shares with this one. Not thread-safe, except `kill`."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.using = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._frames_fd = os.memfd_create("frames")
        self._stderr_fd = os.memfd_create("decoder stderr")

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            TubeletError: it does not start.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._close_pipes()
        roots = {str(Path(package.__path__[0]).parent): None for package in (tubelet_pipeline, tubelet_store)}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: modules in the working directory cannot replace libraries.
        command = [sys.executable, "-P", "-m", "tubelet_pipeline.decode.process_main"]
        command += [str(self._frames_fd), str(os.getpid()), str(self.config.memory_mb)]
        stderr = os.open(f"/proc/self/fd/{self._stderr_fd}", os.O_WRONLY | os.O_APPEND)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                pass_fds=(self._frames_fd,),
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the parent, which closes this process
            )
        finally:
            os.close(stderr)
        self._buffer = b""
        try:
            self._reply(time.monotonic() + _START_TIMEOUT_S)
        except (_Died, _Late) as error:
            tail = self._stderr_tail()
            self.kill()
            raise TubeletError(
                f"A decode process does not start: {tail or 'no message'}",
                "Check the installation: pip install 'tubelet[pipeline]'",
            ) from error

    def decode(self, request: dict[str, Any]) -> DecodedClip:
        """Decode one clip; `request` is a line of `process_main`. Afterwards `using` names the decoder.

        Raises:
            DecodeFailure: any code. After `timeout` and `crash` the next call starts a new process.
            TubeletError: no process can be started.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        self.using = ""
        deadline = time.monotonic() + self.config.timeout_s
        os.ftruncate(self._stderr_fd, 0)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            while (reply := self._reply(deadline))["status"] == "using":
                self.using = reply["decoder"]
        except _Late:
            self.kill()
            raise DecodeFailure("timeout", f"not decoded within {self.config.timeout_s:g} s; process killed") from None
        except (_Died, OSError, ValueError):
            raise self._crash() from None
        if reply["status"] == "failed":
            raise DecodeFailure(reply["code"], reply["message"])
        return self._clip(reply)

    def kill(self) -> None:
        """Kill the process. Any thread may call this."""
        process = self._process
        if process is None:
            return
        process.kill()
        process.wait()

    def close(self) -> None:
        """Kill the process and free the shared memory."""
        self.kill()
        self._close_pipes()
        os.close(self._frames_fd)
        os.close(self._stderr_fd)

    def _close_pipes(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()

    def _reply(self, deadline: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()  # select.select refuses descriptors above 1023
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Late
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                raise _Died
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _crash(self) -> DecodeFailure:
        assert self._process is not None
        self.kill()
        status = self._process.wait()
        end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        tail = self._stderr_tail()
        memory = "bad_alloc" in tail or "MemoryError" in tail
        what = f"the decode process died ({end})" + (f" while {self.using} decoded" if self.using else "")
        return DecodeFailure("memory" if memory else "crash", f"{what}: {tail}" if tail else what)

    def _stderr_tail(self) -> str:
        size = os.fstat(self._stderr_fd).st_size
        lines = os.pread(self._stderr_fd, 2000, max(0, size - 2000)).decode(errors="replace").split("\n")
        return " ".join("".join(c if c.isprintable() else " " for c in " ".join(lines)).split())[-300:]

    def _clip(self, header: dict[str, Any]) -> DecodedClip:
        frames = np.empty(header["frames"], np.uint8)
        target = frames.data.cast("B")
        read = 0
        while read < len(target):  # one call reads at most 2 GiB
            read += os.preadv(self._frames_fd, [target[read:]], read)
        fields = {name: value for name, value in header.items() if name != "status"}
        fields["frames"] = frames
        fields["frame_indices"] = np.array(header["frame_indices"], np.int64)
        fields["timestamps_s"] = np.array(header["timestamps_s"], np.float64)
        fields["fps"] = float("nan") if header["fps"] is None else header["fps"]
        return DecodedClip(**fields)
