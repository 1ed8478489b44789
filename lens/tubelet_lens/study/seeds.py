"""Figures over all seeds of one variant: how alike the dictionaries are that differ only in their seed."""

from __future__ import annotations

from collections.abc import Sequence

from tubelet_lens.section import Figure
from tubelet_lens.study.cells import Cell


def seed_figures(done: Sequence[Cell]) -> dict[tuple[str, str], tuple[Figure, ...]]:
    """By (source, variant) with two finished seeds or more."""
    return {}
