"""Figures that no single evaluation can give: coherence at one distance in time for all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Figure
from tubelet_lens.study.cells import Cell

_NAMES = {"sae": "SAE", "raw": "raw", "sae_shuffled": "SAE, time shuffled", "raw_shuffled": "raw, time shuffled"}

# Two distances are one if they differ by less than this share: frame rates are rarely exact.
_SAME = 0.01


def common_frames(step_frames: Mapping[str, float]) -> float | None:
    """The smallest distance in frames that is a whole number of latent steps of every source: the largest step, if all
    others divide it."""
    if not step_frames:
        return None
    distance = max(step_frames.values())
    whole = all(abs(distance / step - round(distance / step)) < _SAME for step in step_frames.values())
    return distance if whole else None


def equal_time_figures(done: Sequence[Cell], evaluations: Mapping[str, Evaluation]) -> dict[str, tuple[Figure, ...]]:
    """By cell: pooled autocorrelation at the distance in frames that all sources share; nothing if they share none."""
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
