"""Work on many objects at once, in threads, holding only a few of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in the order of `items`, `threads` at once.

    At most 4 x `threads` items are taken ahead, so a list of any length costs little memory. The first exception is
    raised in its turn; work not yet begun is then dropped.
    """
    queue: deque[tuple[T, Future[R]]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in islice(source, 4 * threads):
                queue.append((item, pool.submit(work, item)))
            while queue:
                item, future = queue.popleft()
                result = future.result()
                for following in islice(source, 1):
                    queue.append((following, pool.submit(work, following)))
                yield item, result
        finally:
            pool.shutdown(cancel_futures=True)
