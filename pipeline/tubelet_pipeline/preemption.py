"""SIGTERM, as SLURM and Kubernetes send it before they take a machine away: leave at once; what is committed stays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Preempted(BaseException):
    """SIGTERM came. Not an Exception: nothing on the way may take it for a failure of its own."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the main thread when SIGTERM comes; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Preempted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
