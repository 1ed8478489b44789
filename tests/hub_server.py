"""A folder as a data set of a Hugging Face Hub on loopback: the four answers that `HfFileSystem` asks for to read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "someone/activations"
REVISION = "main"


class Hub:
    """What a running hub holds, and what it was asked.

    Attributes:
        folder: Content of the data set.
        refusals: Statuses with which the next requests for content are answered.
        sent_bytes: Bytes of content that were sent, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refusals: list[int] = []
        self.sent_bytes: Counter[str] = Counter()


@contextmanager
def hub_server(folder: Path) -> Iterator[tuple[Hub, str]]:
    """A running hub and its URL, for HF_ENDPOINT."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        for head, answer in (
            (f"/api/datasets/{REPOSITORY}/revision/{REVISION}", self._repository),
            (f"/api/datasets/{REPOSITORY}/tree/{REVISION}", self._tree),
            (f"/datasets/{REPOSITORY}/resolve/{REVISION}", self._content),
        ):
            if path == head or path.startswith(f"{head}/"):
                answer(unquote(path.removeprefix(head)).strip("/"))
                return
        self._missing("RepoNotFound")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if urlsplit(self.path).path != f"/api/datasets/{REPOSITORY}/paths-info/{REVISION}":
            self._missing("RepoNotFound")
            return
        paths = [self.hub.folder / path for path in asked["paths"]]
        self._json([self._entry(path) for path in paths if path.exists()])

    def _repository(self, below: str) -> None:
        self._json({"id": REPOSITORY, "sha": hashlib.sha1(b"a commit").hexdigest(), "siblings": []})

    def _tree(self, below: str) -> None:
        folder = self.hub.folder / below
        if not folder.is_dir():
            self._missing("EntryNotFound")
            return
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        self._json([self._entry(path) for path in sorted(folder.rglob("*") if recursive else folder.iterdir())])

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.hub.folder).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        return {"path": name, "oid": oid, "type": "directory", "size": 0} | (
            {"type": "file", "size": path.stat().st_size} if path.is_file() else {}
        )

    def _content(self, below: str) -> None:
        path = self.hub.folder / below
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        if self.hub.refusals:
            self._answer(self.hub.refusals.pop(0), b"not now", {})
            return
        data = path.read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            self._answer(200, data, {})
        else:
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            self._answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
        self.hub.sent_bytes[below] += len(data[start:stop] if first else data)

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
