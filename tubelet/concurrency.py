"""Iterators that work in threads, a bounded number of items ahead of their reader."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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
