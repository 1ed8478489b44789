"""An HTTP proxy that spoils answers: what a network, a tired server and a clock do to a long download.

Reads (GET, HEAD), and writes (PUT, POST) where asked for, are spoilt with a chosen probability, from a seed.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("flip", "truncate", "short", "stall", "reset", "500", "503", "409", "429", "expired")

WRITE_KINDS = ("500", "503", "cut", "lost", "late")
"""Of a write: refused; reset before it arrived whole; done, but its answer lost; done, but its answer stalled."""

_ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "409": (409, "OperationAborted"),
    "429": (429, "TooManyRequests"),
    "expired": (400, "ExpiredToken"),
}


class FaultyProxy:
    """The proxy in front of the server at `upstream` (http://host:port).

    Attributes:
        share: Probability that a read is spoilt.
        kinds: Kinds of fault to draw from.
        write_kinds: Kinds of fault of writes; none by default.
        refuse: Hang up on every request, as a server that is being restarted.
        drop_headers: Headers of requests that do not reach the server.
        forbid_headers: Headers with which a request is refused (403).
        only: Whether the read of a path may be spoilt.
        faults: Faults done, by kind.
    """

    def __init__(self, upstream: str, seed: int = 0, stall_s: float = 2.0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.share = 0.0
        self.kinds: Sequence[str] = KINDS
        self.write_kinds: Sequence[str] = ()
        self.drop_headers: Sequence[str] = ()
        self.forbid_headers: Sequence[str] = ()
        self.refuse = False
        self.only: Callable[[str], bool] = lambda path: True
        self.stall_s = stall_s
        self.faults: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self, path: str, writing: bool = False) -> tuple[str | None, float]:
        """The fault for the next request (None: none), and a number in [0, 1) that says where in the answer."""
        kinds = self.write_kinds if writing else self.kinds
        with self._lock:
            if not kinds or not self.only(path) or self._random.random() >= self.share:
                return None, 0.0
            kind = self._random.choice(kinds)
            self.faults[kind] += 1
            return kind, self._random.random()


@contextmanager
def faulty_proxy(upstream: str, seed: int = 0, stall_s: float = 2.0) -> Iterator[tuple[FaultyProxy, str]]:
    """A running proxy and its URL."""
    proxy = FaultyProxy(upstream, seed, stall_s)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on spoilt answers: nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultyProxy

    def log_message(self, format: str, *args: object) -> None: ...

    def _pass(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.send_error(501)
            return
        body = self.rfile.read(length) if length else None
        if self.proxy.refuse:
            self._hang_up()
            return
        if any(name in self.headers for name in self.proxy.forbid_headers):
            self._answer_error(403, "AccessDenied")
            return
        kind, where = (None, 0.0)
        if self.command in ("GET", "HEAD", "PUT", "POST"):
            kind, where = self.proxy.draw(self.path, writing=self.command in ("PUT", "POST"))
        if kind in _ERRORS:
            self._answer_error(*_ERRORS[kind])
            return
        if kind == "cut":
            self._hang_up()
            return
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        passed = {k: v for k, v in self.headers.items() if k not in self.proxy.drop_headers}
        upstream.request(self.command, self.path, body, passed)
        answer = upstream.getresponse()
        data = bytearray(answer.read())
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        upstream.close()
        if kind in ("lost", "late"):
            if kind == "late":
                time.sleep(self.proxy.stall_s)
            self._hang_up()
            return
        if kind is None or answer.status >= 300 or not data:
            self._answer(answer.status, headers, bytes(data))
            return
        place = int(where * len(data))
        if kind == "flip":
            data[place] ^= 1 << (place % 8)
            self._answer(answer.status, headers, bytes(data))
        elif kind == "short":
            headers = [(k, v) for k, v in headers if k.lower() not in ("content-length", "content-range")]
            self._answer(answer.status, [*headers, ("Content-Length", str(place))], bytes(data[:place]))
        else:
            self._answer(answer.status, headers, bytes(data[:place]))
            self.close_connection = True
            if kind == "stall":
                time.sleep(self.proxy.stall_s)
            if kind == "reset":
                self._hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.wfile.flush()

    def _answer_error(self, status: int, code: str) -> None:
        data = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>spoilt</Message></Error>'.encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data)
