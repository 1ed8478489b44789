"""Told to stop: Ctrl-C, or SIGTERM, which SLURM and Kubernetes send before they take a machine away.

    signal ─▶ noted ─▶ the step in work ends ─▶ checkpoint ─▶ the process ends

A second signal does what it always does.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from tubelet_trainer.ranks import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether this process, or another rank of its run, was told to stop."""

    def __init__(self) -> None:
        self._came: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note signals instead of being interrupted by them. Other threads than the main one get none anyway."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {each: signal.getsignal(each) or signal.SIG_DFL for each in _SIGNALS}

        def restore() -> None:
            for each, handler in before.items():
                signal.signal(each, handler)

        def note(number: int, _frame: FrameType | None) -> None:
            self._came = number
            print("tubelet: stopping after this step; once more stops at once.", file=sys.stderr, flush=True)
            restore()

        for each in _SIGNALS:
            signal.signal(each, note)
        try:
            yield self
        finally:
            restore()

    def came(self, ranks: Ranks, device: torch.device) -> bool:
        """Some rank was told to stop; a collective call."""
        if ranks.size == 1:
            return self._came is not None
        told = torch.tensor(float(self._came is not None), device=device)
        return float(ranks.sum(told)) > 0

    def leave(self) -> None:
        """End as the signal asks.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM, here or on another rank.
        """
        if self._came == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
