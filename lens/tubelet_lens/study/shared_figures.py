"""Figures that no single evaluation can give, because they need several cells.

equal_time_figures    by cell: coherence at one distance in time for all sources
figures_over_seeds    by (source, variant): how alike the dictionaries are that differ only in their seed
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from tubelet.errors import TubeletError
from tubelet_lens.metrics.seed_stability import seed_figures
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Figure
from tubelet_lens.study.cells import Cell

_NAMES = {"sae": "SAE", "raw": "raw", "sae_shuffled": "SAE, time shuffled", "raw_shuffled": "raw, time shuffled"}

# Distances that differ by a smaller share count as equal: frame rates are rarely exact.
_TOLERANCE = 0.01


def common_frames(step_frames: Mapping[str, float]) -> float | None:
    """The largest latent step in frames, if it is a whole number of latent steps of every source; else None."""
    if not step_frames:
        return None
    distance = max(step_frames.values())
    whole = all(abs(distance / step - round(distance / step)) < _TOLERANCE for step in step_frames.values())
    return distance if whole else None


def equal_time_figures(done: Sequence[Cell], evaluations: Mapping[str, Evaluation]) -> dict[str, tuple[Figure, ...]]:
    """Pooled autocorrelation at the distance in frames that all sources share, by cell; {} if they share none."""
    steps: dict[str, float] = {}
    for cell in done:
        figures = {figure.name: figure.value for figure in evaluations[cell.name].figures()}
        if (step := figures.get("coherence.step_frames")) is None:
            return {}
        steps[cell.source] = step
    distance = common_frames(steps)
    if distance is None or len(steps) < 2:
        return {}
    return {cell.name: _at(evaluations[cell.name], round(distance / steps[cell.source]), distance) for cell in done}


def _at(evaluation: Evaluation, lag: int, frames: float) -> tuple[Figure, ...]:
    curves = {curve.name: curve for section in evaluation.sections for curve in section.curves}
    curve = curves.get("coherence.lags")
    if curve is None or float(lag) not in curve.x:
        return ()
    place = curve.x.index(float(lag))
    return tuple(
        Figure(
            name=f"coherence.equal_frames.{line.subject}",
            title=f"Autocorrelation at {frames:g} frames",
            subject=line.subject,
            value=line.y[place],
            n=evaluation.coverage.clips,
            n_of="clips",
            definition=f"{_NAMES.get(line.subject, line.subject)}: pooled autocorrelation (mean over features) of "
            f"tokens of one patch {frames:g} frames apart, which are {lag} latent steps here.",
            better="high" if line.subject == "sae" else "neither",
        )
        for line in curve.lines
    )


def figures_over_seeds(done: Sequence[Cell]) -> dict[tuple[str, str], tuple[Figure, ...]]:
    """Seed stability by (source, variant), of those with at least two finished seeds."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in done:
        grouped.setdefault((cell.source, cell.variant), []).append(cell)
    figures = {}
    for key, seeds in grouped.items():
        # An SAE without live latents has nothing to match; its own row shows that it is dead.
        with contextlib.suppress(TubeletError):
            figures[key] = seed_figures(
                [cell.folder / "run" for cell in seeds], [cell.folder / "evaluation" for cell in seeds]
            )
    return figures
