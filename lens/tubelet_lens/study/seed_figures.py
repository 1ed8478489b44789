"""Figures over all seeds of one variant: how alike the dictionaries are that differ only in their seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from tubelet.errors import TubeletError
from tubelet_lens.metrics.seed_stability import seed_figures
from tubelet_lens.results.section import Figure
from tubelet_lens.study.cells import Cell


def figures_over_seeds(done: Sequence[Cell]) -> dict[tuple[str, str], tuple[Figure, ...]]:
    """By (source, variant), of those with two finished seeds or more."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in done:
        grouped.setdefault((cell.source, cell.variant), []).append(cell)
    found = {}
    for key, seeds in grouped.items():
        # An SAE of which nothing is alive has nothing to match; its own row says that it is dead.
        with contextlib.suppress(TubeletError):
            found[key] = seed_figures(
                [cell.folder / "run" for cell in seeds], [cell.folder / "evaluation" for cell in seeds]
            )
    return found
