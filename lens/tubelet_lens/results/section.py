"""Result of a metric: figures with their definitions, curves to plot, and notes on reading them.

    Section (one metric) ─┬─ Figure   one number: value, unit of counting, definition
                          └─ Curve    lines or bars over one axis, with their definition

The JSON file holds sections unchanged; the report renders any section, so a new metric needs no new template.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tubelet.config import Config

Subject = Literal[
    "sae",
    "raw",
    "sae_shuffled",
    "raw_shuffled",
    "untrained",
    "random_topk",
    "pca",
    "permuted",
    "random",
]
"""What a figure is about: the SAE's codes; the raw activations; either with time shuffled (a null); the codes of the
same SAE before training; a random projection with TopK of the same width; principal components; the codes with their
clips permuted (a null); latents or directions drawn at random (a control of edits)."""


class Figure(Config):
    """One number of an evaluation."""

    name: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)+$")
    """Unique, stable key: `section.quantity` or `section.quantity.subject`."""
    title: str = Field(min_length=1)
    """Displayed name; figures of one section that share it form one row, a column per subject."""
    subject: Subject = "sae"
    value: float | None
    """None: undefined on these data (see the definition)."""
    low: float | None = None
    """Lower end of the range of the value: lowest of repeated draws, or end of an interval (see the definition)."""
    high: float | None = None
    n: int = Field(ge=0)
    """Number of samples the figure is computed from."""
    n_of: str = Field(min_length=1)
    """What `n` counts: tokens, pairs of tokens, latents, ..."""
    definition: str = Field(min_length=1)
    """Formula and conventions, self-contained."""
    style: Literal["number", "percent", "count", "seconds"] = "number"
    """How to print it."""
    better: Literal["high", "low", "neither"] = "neither"
    headline: bool = False
    """Stands in the row of large figures at the top of the report."""


class Line(Config):
    """One line of a curve, or its bars."""

    label: str
    subject: Subject = "sae"
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] | None = None
    """Lower edge of the band around the line."""
    high: tuple[float | None, ...] | None = None


class Curve(Config):
    """A plot and the numbers in it."""

    name: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)+$")
    title: str = Field(min_length=1)
    kind: Literal["line", "bars"] = "line"
    x_label: str
    y_label: str
    x: tuple[float, ...]
    """Positions; of bars, their n + 1 edges."""
    lines: tuple[Line, ...]
    definition: str = Field(min_length=1)
    log_x: bool = False
    """Powers of two."""
    log_y: bool = False
    zero_line: bool = False
    """Draw y = 0, where that is a reference."""
    integer_x: bool = False


class Section(Config):
    """Everything one metric reports."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    lead: str
    """What the section answers, in a sentence or two."""
    figures: tuple[Figure, ...] = ()
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes on reading the figures."""


def ratio(numerator: float, denominator: float) -> float | None:
    """`numerator / denominator`; None where the denominator is 0."""
    return numerator / denominator if denominator else None
