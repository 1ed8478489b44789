"""Stop requests: Ctrl-C, or SIGTERM, which SLURM and Kubernetes send before they reclaim a machine.

    signal ─▶ noted ─▶ the current step ends ─▶ checkpoint ─▶ the process ends

A second signal at least one second later has its usual effect. An earlier one may be the same request: a scheduler
signals every process, and the launcher of several ranks forwards its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from tubelet_trainer.process_group import ProcessGroup

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_WITHIN_S = 1.0
_NOTE = b"tubelet: stopping after this step; a second signal stops at once.\n"


class StopRequest:
    """Whether this process, or another rank of its run, was asked to stop."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._came_at_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note signals instead of being interrupted by them. Python delivers signals to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {each: signal.getsignal(each) or signal.SIG_DFL for each in _SIGNALS}
        # A signal that the parent process ignores (a background job ignores Ctrl-C) stays ignored.
        before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}

        def restore() -> None:
            for each, handler in before.items():
                signal.signal(each, handler)

        def note(number: int, _frame: FrameType | None) -> None:
            if self._came is None:
                self._came, self._came_at_s = number, time.monotonic()
                # Not `print`: the signal may have interrupted one, and the reader may be gone.
                with contextlib.suppress(OSError):
                    os.write(2, _NOTE)
            elif time.monotonic() - self._came_at_s > _SAME_WITHIN_S:
                restore()
                signal.raise_signal(number)

        for each in before:
            signal.signal(each, note)
        try:
            yield self
        finally:
            restore()

    def requested(self, ranks: ProcessGroup, device: torch.device) -> bool:
        """Whether some rank was asked to stop; a collective call."""
        if ranks.size == 1:
            return self._came is not None
        requested = torch.tensor(float(self._came is not None), device=device)
        return float(ranks.sum(requested)) > 0

    def leave(self, ranks: ProcessGroup) -> None:
        """End the process as the signal requires, all ranks together: the launcher kills the rest when one has ended.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM, here or on another rank.
        """
        ranks.wait()
        if self._came == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
