"""Values that must not be shared with a forked child: clients, their threads, their connections."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value built on first use in each process, anew in a forked child.

    Args:
        build: Makes the value.
    """

    _alive: ClassVar[weakref.WeakSet[PerProcess[Any]]] = weakref.WeakSet()

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        # The parent's stays in a forked child: to end a client whose threads are not there may wait for ever.
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
        """In the child: whatever thread held a lock is not here."""
        for each in cls._alive:
            each._lock = threading.Lock()


os.register_at_fork(after_in_child=PerProcess.after_fork)
