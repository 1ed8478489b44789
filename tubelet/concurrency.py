"""Iterators that work in threads, a bounded number of items ahead of their reader; values built once per process."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_POLL_S = 0.1


def in_parallel(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in the order of `items`, `threads` at once.

    At most 4 x `threads` items are taken ahead, so that a list of any length needs little memory. The first exception
    is raised in its place; work that has not begun is then dropped.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in islice(source, 4 * threads):
                pending.append((item, pool.submit(work, item)))
            while pending:
                item, future = pending.popleft()
                result = future.result()
                for following in islice(source, 1):
                    pending.append((following, pool.submit(work, following)))
                yield item, result
        finally:
            pool.shutdown(cancel_futures=True)


def prefetched(items: Iterable[T], depth: int, thread_name: str) -> Iterator[T]:
    """The same items in the same order, made by a thread that keeps at most `depth` finished items ready.

    An exception of `items` is raised in its place. Leaving the loop early ends the thread after its current item.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    is_closed = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(entry, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=make, name=thread_name, daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        is_closed.set()
        thread.join()


class PerProcess(Generic[T]):
    """A value built on first use in each process, again in a forked child: clients, their threads and connections.

    Args:
        build: Makes the value.
    """

    _alive: ClassVar[weakref.WeakSet[PerProcess[Any]]] = weakref.WeakSet()

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        # A forked child keeps the parent's: closing a client whose threads do not exist here may hang.
        self._made: dict[int, T] = {}
        self._lock = threading.Lock()
        PerProcess._alive.add(self)

    def __call__(self) -> T:
        """This process's value."""
        with self._lock:
            if os.getpid() not in self._made:
                self._made[os.getpid()] = self._build()
            return self._made[os.getpid()]

    def forget(self) -> None:
        """Build the value again on its next use."""
        with self._lock:
            self._made.pop(os.getpid(), None)

    @classmethod
    def after_fork(cls) -> None:
        """In the child: a thread that held a lock does not exist here."""
        for each in cls._alive:
            each._lock = threading.Lock()


os.register_at_fork(after_in_child=PerProcess.after_fork)
