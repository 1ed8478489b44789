"""The threads of a mirror: those that read parts, and those that fetch objects ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tubelet_store.mirror.shard_object import ShardObject

# Objects fetched ahead at once: the second one keeps the connections busy while the first one ends.
_AHEAD = 2


class Workers:
    """The threads of one process: connections, and those that fetch ahead."""

    def __init__(self, connections: int) -> None:
        self.pool = ThreadPoolExecutor(connections, thread_name_prefix="tubelet-mirror")
        self._changed = threading.Condition()
        self._ahead: list[ShardObject] = []
        self._threads: list[threading.Thread] = []

    def expect(
        self,
        coming: list[ShardObject],
        has: Callable[[ShardObject], bool],
        fetch: Callable[[ShardObject], bool],
    ) -> None:
        """Call `fetch` in order, in the background, for what of `coming` is not here; forget what was asked before."""
        with self._changed:
            self._ahead = [wanted for wanted in coming if not has(wanted)]
            self._changed.notify_all()
            while self._ahead and len(self._threads) < _AHEAD:
                # Daemons: a process that ends does not wait for what it will not use. The parts that came are kept.
                thread = threading.Thread(target=self._run, args=(fetch,), name="tubelet-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self, fetch: Callable[[ShardObject], bool]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ahead)
                wanted = self._ahead.pop(0)
            # What fails here fails again, and is told, where it is needed.
            with contextlib.suppress(Exception):
                fetch(wanted)
