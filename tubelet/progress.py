"""Progress on stderr: a bar in a terminal, a plain line every few seconds elsewhere. Results go to stdout.

with Progress("evaluating", total=len(clips), unit="clips") as progress:
    for clip in clips:
        ...
        progress.advance()

evaluating: 120 of 800 clips, 40 clips/s, 17 s left
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tubelet.formats import human_bytes, human_seconds, number

LINE_EVERY_S = 10.0
_QUICK_S = 0.1


class Progress:
    """Shows how much of a job is done, its rate and the time left. Use as a context manager.

    Args:
        label: What is being done: `evaluating`.
        total: Units of work; None: not known yet; set by `update`.
        unit: What is counted, plural: `clips`; `bytes` are shown as KiB, MiB, ...
        done: Units done before this process started; they do not count for the rate.
        is_silent: Show nothing (all processes of a group but one).
        line_every_s: Seconds between plain lines; the first comes after a fifth of it.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        is_silent: bool = False,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._done_before = done
        self._is_silent = is_silent
        self._line_every_s = line_every_s
        self._bar: Any = None
        self._restart_clock()

    def restart(self, done: int) -> None:
        """Measure the rate from now on, with `done` units done: the time to start workers is not part of it."""
        self.done = self._done_before = done
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._start_s = time.monotonic()
        self._next_line_s = self._start_s + self._line_every_s / 5

    def __enter__(self) -> Progress:
        if not self._is_silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[amount]}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            # Output during the loop goes above the bar, if both are on one terminal; never from a file to stderr.
            one_terminal = sys.stdout.isatty()
            console = Console(stderr=True)
            self._bar = Bar(*columns, console=console, transient=True, expand=True, redirect_stdout=one_terminal)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, amount="", text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """`count` more units are done."""
        self.update(self.done + count, text=text)

    def update(self, done: int, *, total: int | None = None, text: str | None = None) -> None:
        """`done` units are done in all.

        Args:
            done: Including those before this process started.
            total: The total, where it has become known.
            text: Shown after the amount; None: the rate.
        """
        self.done = done
        self.total = self.total if total is None else total
        if self._is_silent:
            return
        text = self._rate() if text is None else text
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=done, amount=self._amount(), text=text)
            return
        now = time.monotonic()
        is_last = done == self.total
        # A task that ends immediately needs no line.
        if now >= self._next_line_s or (is_last and now - self._start_s >= _QUICK_S):
            self._next_line_s = now + self._line_every_s
            parts = [self._amount(), text, f"in {human_seconds(now - self._start_s)}" if is_last else self._left()]
            self.note(f"{self.label}: {', '.join(part for part in parts if part)}")

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._is_silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _amount(self) -> str:
        show = human_bytes if self.unit == "bytes" else "{:,}".format
        unit = f" {self.unit}" if self.unit and self.unit != "bytes" else ""
        return f"{show(self.done)}{unit}" if self.total is None else f"{show(self.done)} of {show(self.total)}{unit}"

    def _rate(self) -> str:
        done, seconds = self.done - self._done_before, time.monotonic() - self._start_s
        if not done or seconds <= 0:
            return ""
        if self.unit == "bytes":
            return f"{human_bytes(done / seconds)}/s"
        per_s = done / seconds
        return f"{number(per_s)} {self.unit or 'steps'}/s" if per_s >= 1 else f"{human_seconds(1 / per_s)} each"

    def _left(self) -> str:
        done = self.done - self._done_before
        if not done or self.total is None:
            return ""
        seconds = (time.monotonic() - self._start_s) / done * (self.total - self.done)
        return f"{human_seconds(seconds)} left"
