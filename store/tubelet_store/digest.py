"""Checksums of an object, computed while its bytes are read: SHA-256 of the whole, CRC-32C of each clip in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import google_crc32c


class ObjectDigest:
    """Checksums of an object, updated with its bytes in order.

    Args:
        clips: Clips at the start of the object (none for objects that hold none).
        clip_bytes: Bytes of each.
    """

    def __init__(self, clips: int = 0, clip_bytes: int = 0) -> None:
        self._sha256 = hashlib.sha256()
        self._clips, self._clip_bytes = clips, clip_bytes
        self._crc32c: list[int] = []
        self._running = 0
        self.size_bytes = 0
        """Bytes seen."""

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(data)
        start = 0
        while start < len(data) and len(self._crc32c) < self._clips:
            missing = self._clip_bytes - (self.size_bytes + start) % self._clip_bytes
            part = data[start : start + missing]
            self._running = int(google_crc32c.extend(self._running, part))
            start += len(part)
            if len(part) == missing:
                self._crc32c.append(self._running)
                self._running = 0
        self.size_bytes += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes so far."""
        return self._sha256.hexdigest()

    @property
    def crc32c(self) -> tuple[int, ...]:
        """Checksum of each complete clip so far."""
        return tuple(self._crc32c)


def digest_of(chunks: Iterable[bytes], clips: int = 0, clip_bytes: int = 0) -> ObjectDigest:
    """The checksums of an object that comes in `chunks`."""
    digest = ObjectDigest(clips, clip_bytes)
    for chunk in chunks:
        digest.update(chunk)
    return digest
