"""Writes the site to a folder or URL, each file completely or not at all.

    gallery.json (writing) ─▶ clips/*.webp ─▶ latents/*.html ─▶ index.html ─▶ gallery.json (complete)

If it was interrupted, a second run keeps the sheets, which take the most time, and writes everything else again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from tubelet.concurrency import in_parallel
from tubelet.errors import TubeletError
from tubelet_store.storage import open_root

RECORD = "gallery.json"
INDEX = "index.html"
_FORMAT = "tubelet-gallery"
# Enough to hide the latency of object storage.
_THREADS = 8


class Site:
    """Writes a site. Use as a context manager, which removes unfinished files.

    Args:
        url: Folder or URL.
        sheets: Everything that sheets depend on; existing sheets of another record are deleted.

    Raises:
        TubeletError: the folder has other files than a gallery, or cannot be written.
    """

    def __init__(self, url: str, sheets: Mapping[str, Any]) -> None:
        self.root = open_root(url)
        self._sheets = hashlib.sha256(json.dumps(sheets, sort_keys=True).encode()).hexdigest()
        self._stack = contextlib.ExitStack()
        self._folder = Path()
        self.size_bytes = 0
        """Bytes written."""

    def __enter__(self) -> Site:
        # Before the scratch folder is made: a folder that is refused stays unchanged.
        keys = self.root.list_keys()
        before = self._record() if RECORD in keys else None
        if keys and (before is None or before.get("format") != _FORMAT):
            raise TubeletError(f"{self.root.url} has other files than a gallery", "Give an empty or new folder")
        self.sheets: set[int] = set()
        """Clips with an existing sheet."""
        for key in keys:
            if key.startswith("clips/"):
                if before is not None and before.get("sheets") == self._sheets:
                    self.sheets.add(int(PurePosixPath(key).stem))
                else:
                    self.root.delete(key)
        self.root.discard_scratch()
        self._folder = self._stack.enter_context(self.root.scratch())
        self._write_record({"state": "writing"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write (key, bytes), several at a time."""
        for _ in in_parallel(lambda file: self._publish(*file), files, _THREADS):
            pass

    def finish(self, latents: Iterable[int], record: Mapping[str, Any]) -> None:
        """Delete pages of other latents, and record that the site is complete."""
        current = {page_key(latent) for latent in latents}
        for key in self.root.list_keys("latents"):
            if key not in current:
                self.root.delete(key)
        self._write_record({"state": "complete", **record})

    def _write_record(self, record: Mapping[str, Any]) -> None:
        whole = {"format": _FORMAT, "schema_version": 1, "sheets": self._sheets, **record}
        self._publish(RECORD, (json.dumps(whole, indent=2) + "\n").encode())

    def _record(self) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError):
            record = json.loads(self.root.read(RECORD))
            if isinstance(record, dict):
                return record
        return None

    def _publish(self, key: str, data: bytes) -> None:
        # Object storage derives the content type from the suffix.
        path = self._folder / f"{uuid.uuid4().hex}{PurePosixPath(key).suffix}"
        path.write_bytes(data)
        self.root.publish(key, path)
        self.size_bytes += len(data)


def page_key(latent: int) -> str:
    """Key of a latent's page."""
    return f"latents/{latent:06d}.html"


def sheet_key(clip: int) -> str:
    """Key of a clip's sheet."""
    return f"clips/{clip:08d}.webp"
