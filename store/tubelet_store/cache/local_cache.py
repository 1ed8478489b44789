"""The cache of one store: objects as local files, fetched in parts, each part checked before it is written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial as bound
from itertools import islice
from typing import BinaryIO

from tubelet.concurrency import PerProcess
from tubelet.errors import TubeletError
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.partial_file import DISK_FULL, PartialFile
from tubelet_store.cache.shard_files import NoRoom, ShardFiles
from tubelet_store.cache.shard_object import Part, ShardObject
from tubelet_store.storage.client import Client, RetryPolicy
from tubelet_store.storage.remote import open_client

# Objects prefetched in parallel: the second keeps the connections busy while the first one ends.
_AHEAD = 2


class LocalCache:
    """Shards of the store at `url`, kept in a directory under a budget. One per process and store.

    Args:
        url: The store's URL.
        config: ShardFiles, budget, client.
    """

    def __init__(self, url: str, config: CacheConfig | None = None) -> None:
        self.url = url.rstrip("/")
        self.config = config or CacheConfig()
        self.folder = self.config.folder
        self._files = ShardFiles(self.folder, int(self.config.budget))
        retries = RetryPolicy(self.config.attempts, self.config.timeout_s)
        self._client = PerProcess(lambda: open_client(self.url, self.config.client, retries))
        self._threads = PerProcess(lambda: FetchThreads(self.config.connections))

    def __reduce__(self) -> tuple[type[LocalCache], tuple[str, CacheConfig]]:
        return (LocalCache, (self.url, self.config))

    @property
    def client(self) -> Client:
        """The client of this process."""
        return self._client()

    def open(self, wanted: ShardObject) -> BinaryIO:
        """The object as a local file, complete and checked, fetched if missing.

        The file is locked against eviction while it, or a memory map of it, is open.

        Raises:
            TubeletError: it is larger than the budget, or open memory maps leave no evictable space; it cannot be
                reached; it arrives damaged every time.
        """
        return self._files.pinned(wanted.stored) or self._fetch(wanted)

    def fetch(self, wanted: ShardObject) -> bool:
        """Fetch the object without evicting prefetched ones; False if there is no space for it."""
        try:
            with self._files.pinned(wanted.stored) or self._fetch(wanted, demanded=False) as file:
                ShardFiles.unpin(file)
                return True
        except NoRoom:
            return False

    def prefetch(self, coming: Iterable[ShardObject]) -> None:
        """Fetch `coming` in the background, in that order, as far as the budget allows.

        Objects needed sooner are evicted last. Failures are not raised here but by `open`.
        """
        room, ahead = int(self.config.budget), []
        for wanted in coming:
            room -= wanted.stored.size_bytes
            if room < 0:
                break
            ahead.append(wanted)
        self._files.expected = {wanted.stored.sha256: number for number, wanted in enumerate(ahead)}
        self._threads().prefetch(ahead, lambda wanted: self._files.has(wanted.stored), self.fetch)

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
        return self._files.held_bytes()

    def _fetch(self, wanted: ShardObject, demanded: bool = True) -> BinaryIO:
        stored, name = wanted.stored, f"{self.url}/{wanted.stored.key}"
        if stored.size_bytes > self.config.budget:
            raise TubeletError(
                f"{name} has {stored.size_bytes} bytes, the cache in {self.folder} may hold {int(self.config.budget)}",
                f"Set the cache's budget to at least {stored.size_bytes} bytes, better several times that",
            )
        with self._files.claimed(wanted, name) as partial:
            if (file := self._files.pinned(stored)) is not None:
                return file
            try:
                self._files.reserve(partial, stored, demanded)
                self._download(partial, wanted)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                partial.drop()
                raise self._files.disk_full(stored) from error
            return self._files.keep(partial, stored)

    def _download(self, partial: PartialFile, wanted: ShardObject) -> None:
        parts = wanted.parts()
        arrived = partial.arrived()
        missing = [part for part in parts if not arrived[part.number] or partial.damaged(wanted, part)]
        self._threads().run([bound(self._fetch_part, partial, wanted, part) for part in missing])
        if self.config.check == "sha256" and partial.sha256() != wanted.stored.sha256:
            partial.forget()
            raise TubeletError(
                f"{self.url}/{wanted.stored.key} arrived with a digest that differs from the manifest's although every"
                " clip's checksum is right: it was changed on purpose",
                "Do not use this copy; fetch the store from a source you trust",
            )

    def _fetch_part(self, partial: PartialFile, wanted: ShardObject, part: Part) -> None:
        """Fetch, check and write one part."""
        damage: str | None = None
        for _ in range(self.config.attempts):
            try:
                data = self.client.read_range(wanted.stored.key, part.start, part.stop)
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


class FetchThreads:
    """The threads of one process: connections, and those that fetch ahead, which end when nothing is left to fetch."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="tubelet-cache")
        self._changing = threading.Lock()
        self._ahead: list[ShardObject] = []
        self._running = 0

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all `jobs`, as many at once as there are connections; at the first failure no more, and raise it."""
        # Submitted one by one: work queued in a pool would still run when the process ends.
        coming = iter(jobs)
        running = {self._pool.submit(job) for job in islice(coming, self._connections)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {self._pool.submit(job) for job in islice(coming, len(done))}
        finally:
            # Also when interrupted: running jobs still write into the file, which is closed next.
            for future in running:
                future.cancel()
            wait(running)

    def prefetch(
        self,
        coming: list[ShardObject],
        has: Callable[[ShardObject], bool],
        fetch: Callable[[ShardObject], bool],
    ) -> None:
        """Call `fetch` in order, in the background, for what of `coming` is not here; forget what was asked before."""
        with self._changing:
            self._ahead = [wanted for wanted in coming if not has(wanted)]
            for _ in range(min(len(self._ahead), _AHEAD) - self._running):
                # Daemon threads: a process that ends does not wait for shards that it will not use.
                threading.Thread(target=self._run, args=(fetch,), name="tubelet-ahead", daemon=True).start()
                self._running += 1

    def _run(self, fetch: Callable[[ShardObject], bool]) -> None:
        while True:
            with self._changing:
                if not self._ahead:
                    self._running -= 1
                    return
                wanted = self._ahead.pop(0)
            # A failure is raised again when the shard is opened.
            with contextlib.suppress(Exception):
                fetch(wanted)
