"""Training curves, from the run's `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tubelet_lens.results.section import Curve, Line, Section

_CURVES = (
    (
        "fvu",
        "FVU during training",
        "FVU",
        "Fraction of variance unexplained, of training batches and of held-out tokens.",
    ),
    (
        "dead",
        "Dead latents during training",
        "share of latents",
        "Training: share of latents silent for longer than the run's dead-after window. Held-out: share that fired on "
        "none of the held-out tokens of that evaluation. The two count different things.",
    ),
)
_KINDS = (("train", "training"), ("eval", "held-out"))

# More points than pixels only make the file larger.
_MOST_POINTS = 400


def training_section(run: Path) -> Section | None:
    """Curves of the run in folder `run`; None where it keeps no metrics."""
    lines = _read(run / "metrics.jsonl")
    curves = [curve for name, *words in _CURVES if (curve := _curve(lines, name, *words)) is not None]
    if not curves:
        return None
    return Section(
        name="training",
        title="Training",
        lead="How the run got here, as it was logged at the time.",
        curves=tuple(curves),
    )


def _curve(lines: list[dict[str, Any]], name: str, title: str, y_label: str, definition: str) -> Curve | None:
    points_of = {
        label: {
            line["step"]: float(line[name]) for line in lines if line.get("kind") == kind and _is_number(line, name)
        }
        for kind, label in _KINDS
    }
    thinned = {label: _thin(points) for label, points in points_of.items() if points}
    steps = sorted({step for points in thinned.values() for step in points})
    if not steps:
        return None
    return Curve(
        name=f"training.{name}",
        title=title,
        x_label="step",
        y_label=y_label,
        x=tuple(float(step) for step in steps),
        lines=tuple(
            Line(
                label=label,
                subject="raw" if label == "held-out" else "sae",
                y=tuple(points.get(step) for step in steps),
            )
            for label, points in thinned.items()
        ),
        definition=definition,
    )


def _thin(points: dict[int, float]) -> dict[int, float]:
    steps = sorted(points)
    stride = math.ceil(len(steps) / _MOST_POINTS)
    return {step: points[step] for step in [*steps[:-1:stride], steps[-1]]}


def _is_number(line: dict[str, Any], name: str) -> bool:
    value = line.get(name)
    return isinstance(line.get("step"), int) and isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a killed run may leave half a line
        if isinstance(line, dict):
            lines.append(line)
    return lines
