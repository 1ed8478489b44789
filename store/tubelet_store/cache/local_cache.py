"""The cache of one store: objects as local files, fetched in parts, each part checked before it is written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial as bound
from typing import BinaryIO

from tubelet.errors import TubeletError
from tubelet_store.cache.config import CacheConfig
from tubelet_store.cache.directory import Directory, NoRoom
from tubelet_store.cache.partial_file import DISK_FULL, Partial
from tubelet_store.cache.shard_object import Part, ShardObject
from tubelet_store.cache.workers import Workers
from tubelet_store.storage.client import Patience, Transport
from tubelet_store.storage.client_choice import open_transport
from tubelet_store.storage.per_process import PerProcess


class LocalCache:
    """Shards of the store at `url`, kept in a directory under a budget. One per process and store.

    Args:
        url: The store's URL.
        config: Directory, budget, client.
    """

    def __init__(self, url: str, config: CacheConfig | None = None) -> None:
        self.url = url.rstrip("/")
        self.config = config or CacheConfig()
        self.folder = self.config.folder
        self._directory = Directory(self.folder, int(self.config.budget))
        patience = Patience(self.config.attempts, self.config.timeout_s)
        self._transport = PerProcess(lambda: open_transport(self.url, self.config.transport, patience))
        self._workers = PerProcess(lambda: Workers(self.config.connections))

    def __reduce__(self) -> tuple[type[LocalCache], tuple[str, CacheConfig]]:
        return (LocalCache, (self.url, self.config))

    @property
    def transport(self) -> Transport:
        """The client of this process."""
        return self._transport()

    def open(self, wanted: ShardObject) -> BinaryIO:
        """The object as a local file, complete and checked, fetched if need be.

        The file is locked against eviction while it, or a memory map of it, is open.

        Raises:
            TubeletError: it is larger than the budget, or there is no room because maps in use fill it; it cannot be
                reached; it arrives damaged every time.
        """
        return self._directory.pinned(wanted.stored) or self._fetch(wanted)

    def fetch(self, wanted: ShardObject) -> bool:
        """Have the object here, without evicting what was asked for by `expect`; False where there is no room."""
        try:
            with self._directory.pinned(wanted.stored) or self._fetch(wanted, demanded=False) as file:
                Directory.unpin(file)
                return True
        except NoRoom:
            return False

    def expect(self, coming: Iterable[ShardObject]) -> None:
        """Fetch `coming` in the background, in that order, as far as the budget allows.

        What is expected later is evicted later. Failures are not raised here: `open` meets them again.
        """
        room, ahead = int(self.config.budget), []
        for wanted in coming:
            room -= wanted.stored.size_bytes
            if room < 0:
                break
            ahead.append(wanted)
        self._directory.expected = {wanted.stored.sha256: number for number, wanted in enumerate(ahead)}
        self._workers().expect(ahead, lambda wanted: self._directory.has(wanted.stored), self.fetch)

    def check_budget(self, smallest_bytes: int, largest_bytes: int) -> None:
        """Refuse a budget under which no object of the store can be held.

        Args:
            smallest_bytes: Size of the store's smallest whole shard object.
            largest_bytes: Of its largest.

        Raises:
            TubeletError: the budget is below the smallest.
        """
        if self.config.budget < smallest_bytes:
            raise TubeletError(
                f"The cache in {self.folder} may hold {int(self.config.budget)} bytes, a shard of {self.url} has"
                f" {smallest_bytes}",
                f"Set the cache's budget to at least {largest_bytes} bytes, better several times that",
            )

    def held_bytes(self) -> int:
        """Bytes in the directory: complete objects and room reserved for those that are coming."""
        return self._directory.held_bytes()

    def _fetch(self, wanted: ShardObject, demanded: bool = True) -> BinaryIO:
        stored, name = wanted.stored, f"{self.url}/{wanted.stored.key}"
        if stored.size_bytes > self.config.budget:
            raise TubeletError(
                f"{name} has {stored.size_bytes} bytes, the cache in {self.folder} may hold {int(self.config.budget)}",
                f"Set the cache's budget to at least {stored.size_bytes} bytes, better several times that",
            )
        with self._directory.claimed(wanted, name) as partial:
            if (file := self._directory.pinned(stored)) is not None:
                return file
            try:
                self._directory.reserve(partial, stored, demanded)
                self._download(partial, wanted)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                partial.drop()
                raise self._directory.disk_full(stored) from error
            return self._directory.keep(partial, stored)

    def _download(self, partial: Partial, wanted: ShardObject) -> None:
        parts = wanted.parts()
        arrived = partial.arrived()
        missing = [part for part in parts if not arrived[part.number] or partial.damaged(wanted, part)]
        self._workers().run([bound(self._bring, partial, wanted, part) for part in missing])
        if self.config.check == "sha256" and partial.sha256() != wanted.stored.sha256:
            partial.forget()
            raise TubeletError(
                f"{self.url}/{wanted.stored.key} arrived with another digest than the manifest's, although every clip's"
                " checksum is right: it was changed on purpose",
                "Do not use this copy; fetch the store from a source you trust",
            )

    def _bring(self, partial: Partial, wanted: ShardObject, part: Part) -> None:
        """Fetch one part, check it, write it."""
        damage: str | None = None
        for _ in range(self.config.attempts):
            try:
                data = self.transport.read_range(wanted.stored.key, part.start, part.stop)
            except FileNotFoundError as error:
                raise TubeletError(
                    f"{self.url}/{wanted.stored.key} is missing", "Run `tubelet verify` on the store"
                ) from error
            damage = wanted.damaged(part, data)
            if damage is None:
                partial.write(part, data)
                return
        raise TubeletError(
            f"{self.url}/{wanted.stored.key}: {damage} arrives damaged ({self.config.attempts} attempts)",
            "Run `tubelet verify` on the store; if it is damaged there, repair it from another copy",
        )
