"""An evaluation as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tubelet_lens.evaluation import Evaluation
from tubelet_lens.plots import svg
from tubelet_lens.section import Figure, Section

SUBJECTS = {
    "sae": "SAE",
    "raw": "Raw",
    "sae_shuffled": "SAE, time shuffled",
    "raw_shuffled": "Raw, time shuffled",
    "untrained": "Untrained SAE",
    "random_topk": "Random projection, TopK",
    "pca": "PCA",
    "permuted": "Clips permuted",
    "random": "Random control",
}
"""Columns of the tables, in order."""

_MINUS = "\N{MINUS SIGN}"


def render_report(evaluation: Evaluation) -> str:
    """The page, as HTML."""
    environment = Environment(
        loader=PackageLoader("tubelet_lens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "anchor": anchor, "flat": lambda tree: list(_flat(tree))}
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        headlines=[figure for figure in evaluation.figures() if figure.headline],
        beside={figure.name: _beside(evaluation, figure) for figure in evaluation.figures() if figure.headline},
        tables={section.name: _table(section) for section in evaluation.sections},
        drawings={curve.name: svg(curve) for section in evaluation.sections for curve in section.curves},
        subjects=SUBJECTS,
    )


def show(figure: Figure) -> str:
    """The figure's value as text; an em dash where it is undefined."""
    if figure.value is None:
        return "—"
    if figure.style == "percent":
        return f"{100 * figure.value:.1f} %".replace("-", _MINUS)
    if figure.style == "count":
        return f"{figure.value:,.0f}"
    if figure.style == "seconds":
        return f"{figure.value:.3g} s"
    return _number(figure.value)


def _number(value: float) -> str:
    size = abs(value)
    if value == round(value) and size < 1e6:
        text = f"{value:,.0f}"
    elif 1e-3 <= size < 1e4:
        # Four digits, but never fewer than one after the point.
        text = f"{value:.{max(1, 3 - max(0, math.floor(math.log10(size))))}f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", _MINUS)


def anchor(name: str) -> str:
    """Id of the definition of the figure or curve `name`."""
    return "def-" + name.replace(".", "-")


def _table(section: Section) -> dict[str, Any]:
    """Rows (by title) and columns (by subject) of a section's figures."""
    rows: dict[str, dict[str, Figure]] = {}
    for figure in section.figures:
        rows.setdefault(figure.title, {})[figure.subject] = figure
    columns = [subject for subject in SUBJECTS if any(subject in row for row in rows.values())]
    # Rows that say nothing but about the SAE would leave the other columns empty: they get a table of their own.
    wide = {title: row for title, row in rows.items() if len(row) > 1}
    narrow = {title: row["sae"] for title, row in rows.items() if len(row) == 1 and "sae" in row}
    return {"columns": columns, "wide": wide, "narrow": narrow}


def _beside(evaluation: Evaluation, headline: Figure) -> list[Figure]:
    """The same figure of other subjects: what a headline must be read beside."""
    others = [
        figure
        for section in evaluation.sections
        if headline in section.figures
        for figure in section.figures
        if figure.title == headline.title and figure.name != headline.name
    ]
    return sorted(others, key=lambda figure: list(SUBJECTS).index(figure.subject))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "—" if tree is None else str(tree)
