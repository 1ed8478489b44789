"""The threads of a cache: those that read parts, and those that fetch objects ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice

from tubelet_store.cache.shard_object import ShardObject

# Objects fetched ahead at once: the second one keeps the connections busy while the first one ends.
_AHEAD = 2


class Workers:
    """The threads of one process: connections, and those that fetch ahead, which end when nothing is left to fetch."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="tubelet-cache")
        self._changing = threading.Lock()
        self._ahead: list[ShardObject] = []
        self._running = 0

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all `jobs`, as many at once as there are connections; at the first failure no more, and raise it."""
        # One by one: what waits in a pool is still done when the process ends.
        coming = iter(jobs)
        running = {self._pool.submit(job) for job in islice(coming, self._connections)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {self._pool.submit(job) for job in islice(coming, len(done))}
        finally:
            # Interrupted too: what has begun still writes into the file, which is closed next.
            for future in running:
                future.cancel()
            wait(running)

    def expect(
        self,
        coming: list[ShardObject],
        has: Callable[[ShardObject], bool],
        fetch: Callable[[ShardObject], bool],
    ) -> None:
        """Call `fetch` in order, in the background, for what of `coming` is not here; forget what was asked before."""
        with self._changing:
            self._ahead = [wanted for wanted in coming if not has(wanted)]
            for _ in range(min(len(self._ahead), _AHEAD) - self._running):
                # Daemons: a process that ends does not wait for what it will not use. The parts that came are kept.
                threading.Thread(target=self._run, args=(fetch,), name="tubelet-ahead", daemon=True).start()
                self._running += 1

    def _run(self, fetch: Callable[[ShardObject], bool]) -> None:
        while True:
            with self._changing:
                if not self._ahead:
                    self._running -= 1
                    return
                wanted = self._ahead.pop(0)
            # What fails here fails again, and is told, where it is needed.
            with contextlib.suppress(Exception):
                fetch(wanted)
