"""Progress of a training run: step, tokens per second, the newest metrics."""

from __future__ import annotations

from collections.abc import Mapping

from tubelet.progress import Progress


class ProgressReport(Progress):
    """Shows a training run on stderr.

    Args:
        steps: Length of the run.
        step: Steps taken before.
        silent: Show nothing: another process of the group does.
    """

    def __init__(self, steps: int, step: int, silent: bool = False) -> None:
        super().__init__("training", steps, "steps", done=step, is_silent=silent)

    def __enter__(self) -> ProgressReport:
        super().__enter__()
        return self

    def metrics(self, step: int, tokens_per_s: float, means: Mapping[str, float], saes: int) -> None:
        """Show the metrics of a training step, means over `saes`."""
        mean = f"mean of {saes}: " if saes > 1 else ""
        figures = f"{mean}FVU {means['fvu']:.4f}, L0 {means['l0']:.1f}, dead {means['dead']:.1%}"
        self.update(step, text=f"{tokens_per_s:,.0f} tokens/s, {figures}")
