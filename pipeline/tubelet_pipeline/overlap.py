"""Run one stage of a pipeline in a thread of its own, a bounded number of items ahead of the next stage."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.1


def ahead(items: Iterable[T], depth: int, name: str) -> Iterator[T]:
    """The same items in the same order, made by a thread that runs at most `depth` finished items ahead.

    An exception of `items` is raised here, in its place. Leaving the loop early ends the thread after its current item.
    """
    made: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> bool:
        while not left.is_set():
            try:
                made.put(entry, timeout=_POLL_S)
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

    thread = threading.Thread(target=make, name=name, daemon=True)
    thread.start()
    try:
        while (entry := made.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        left.set()
        thread.join()
