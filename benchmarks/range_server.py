"""A fast server of files over HTTP, enough of S3 to read a store from: GET with Range, HEAD. One thread per connection.

    python benchmarks/range_server.py FOLDER [--mb-per-s N]    serves FOLDER/bucket/key as /bucket/key, prints its port

The bytes go from the page cache to the socket (sendfile), so that on loopback the clients are what is measured. With a
limit, all connections together send no faster than that, as over a network card.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CHUNK_BYTES = 256 << 10


class _Rate:
    """Lets `bytes_per_s` through, all threads together."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            start = max(self._free_at, time.monotonic())
            self._free_at = start + size_bytes / self._bytes_per_s
        if (pause := self._free_at - time.monotonic()) > 0.002:
            time.sleep(pause)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    rate: _Rate | None

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The object, or the range asked for."""
        try:
            file = (self.folder / self.path.partition("?")[0].lstrip("/")).open("rb")
        except OSError:
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            self.send_response_only(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            start, stop, status = 0, size, 200
            if matched := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
                first, last = matched.groups()
                start = int(first) if first else size - int(last)
                stop = min(int(last) + 1, size) if first and last else size
                status = 206
            self.send_response_only(status)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.flush()
            while start < stop:
                count = stop - start if self.rate is None else min(_CHUNK_BYTES, stop - start)
                if self.rate is not None:
                    self.rate.wait(count)
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, count)

    do_HEAD = do_GET


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may hang up."""


@contextmanager
def range_server(folder: Path, mb_per_s: float | None = None) -> Iterator[str]:
    """A server of `folder` in a process of its own; its URL."""
    command = [sys.executable, __file__, str(folder), *(["--mb-per-s", str(mb_per_s)] if mb_per_s else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb-per-s", type=float)
    given = parser.parse_args()
    rate = _Rate(1e6 * given.mb_per_s) if given.mb_per_s else None
    handler = type("Handler", (_Handler,), {"folder": given.folder, "rate": rate})
    server = _Server(("127.0.0.1", 0), handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    server.serve_forever()


def end_with_parent() -> None:
    """Do not outlive a benchmark that was killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()
