"""What a person sees while training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class ProgressReport:
    """Shows step, tokens per second and the newest metrics (of several SAEs their means), on stderr."""

    def __init__(self, steps: int, step: int, silent: bool = False) -> None:
        self._steps = steps
        self._silent = silent
        self._line_at_s = float("-inf")
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not silent:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def metrics(self, step: int, tokens_per_s: float, means: Mapping[str, float], saes: int) -> None:
        """Show the metrics of a training step, means over `saes`; without a terminal a line every 10 seconds."""
        mean = f"mean of {saes}: " if saes > 1 else ""
        figures = f"FVU {means['fvu']:.4f}  L0 {means['l0']:.1f}  dead {means['dead']:.1%}"
        text = f"{tokens_per_s:,.0f} tokens/s  {mean}{figures}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._line_at_s > _LINE_EVERY_S or step == self._steps:
            self._line_at_s = time.monotonic()
            self.note(f"step {step}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
