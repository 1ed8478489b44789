"""Tables of a study: a row per (source, variant), a column per figure, with mean and spread over seeds.

evaluations of the cells ─▶ figure_frame (a row per figure and cell) ─▶ study_table, one per question
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tubelet.formats import UNDEFINED
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Figure
from tubelet_lens.study.cells import Cell
from tubelet_lens.study.config import SourceConfig
from tubelet_lens.study.questions import Column, Question

_ALIKE = 0.7
"""Share of words that two definitions must have in common to be merged."""

_SHOWN = 4
"""Different words shown at one position."""

# Separators, which are kept: spaces and punctuation around words, but not the point or comma inside a number.
_BETWEEN = re.compile(r"(\s|[();:]|[.,](?=\s|$))")


_ROW = ["source", "variant"]
_STATISTICS = {"mean": "", "sd": ".sd", "low": ".low", "high": ".high", "seeds": ".seeds"}
"""Statistics over seeds, with the suffix of their columns in CSV files."""


def figure_frame(
    done: Sequence[Cell],
    evaluations: Mapping[str, Evaluation],
    of_cells: Mapping[str, Sequence[Figure]],
    of_seeds: Mapping[tuple[str, str], Sequence[Figure]],
) -> pd.DataFrame:
    """A row per figure and cell, or per figure and (source, variant) where it compares the seeds of a variant.

    Args:
        done: Finished cells.
        evaluations: By name of the cell.
        of_cells: Further figures by name of the cell.
        of_seeds: Figures that compare the seeds of a (source, variant).

    Returns:
        Columns: source, variant, origin (what the figure is of), is_per_seed, cells (finished ones of the row's
        variant), and figure, value, low, high, style, better, definition of the figure.
    """
    cells = Counter((cell.source, cell.variant) for cell in done)
    fields = ["value", "low", "high", "style", "better", "definition"]
    rows: list[tuple[object, ...]] = []

    def add(source: str, variant: str, origin: str, is_per_seed: bool, figures: Iterable[Figure]) -> None:
        where = (source, variant, origin, is_per_seed, cells[source, variant])
        rows.extend((*where, figure.name, *(getattr(figure, field) for field in fields)) for figure in figures)

    for cell in done:
        figures = {figure.name: figure for figure in (*evaluations[cell.name].figures(), *of_cells.get(cell.name, ()))}
        add(cell.source, cell.variant, cell.name, True, figures.values())
    for (source, variant), shared in of_seeds.items():
        add(source, variant, f"{source}/{variant}", False, shared)
    names = ["source", "variant", "origin", "is_per_seed", "cells", "figure", *fields]
    frame = pd.DataFrame(rows, columns=names)
    return frame.astype({"value": float, "low": float, "high": float})


@dataclass(frozen=True, eq=False)
class StudyTable:
    """The answer to one question.

    Attributes:
        question: The question that the table answers.
        columns: Those of the question's columns for which any cell has a figure.
        definitions: What each column is, from the figures of all cells: one definition, or several where cells differ.
        values: A row per (source, variant); columns source, backbone, dataset, variant, and of each figure its mean,
            and with the suffixes .sd (standard deviation, n - 1), .low, .high and .seeds the other statistics over
            seeds. Of a figure that compares seeds: its value, lowest and highest.
        texts: The same rows as text; columns as in `columns`.
        best: bool Whether a text is the best of its source, where one direction is better.
    """

    question: Question
    columns: tuple[Column, ...]
    definitions: tuple[tuple[str, ...], ...]
    values: pd.DataFrame
    texts: pd.DataFrame
    best: pd.DataFrame

    def csv(self) -> str:
        """`values` as CSV."""
        return str(self.values.to_csv(index=False, lineterminator="\n"))

    def rows(self) -> list[tuple[str, str, list[tuple[str, bool]]]]:
        """(source, variant, [(text, whether it is the best)]) of each row."""
        return [
            (source, variant, list(zip(texts, best, strict=True)))
            for source, variant, texts, best in zip(
                self.values["source"],
                self.values["variant"],
                self.texts.itertuples(index=False),
                self.best.itertuples(index=False),
                strict=True,
            )
        ]

    def markdown(self) -> str:
        """As a Markdown table; the best of each source is bold."""
        # A bar would end the cell.
        heads = ["source", "variant", *(column.title.replace("|", "\\|") for column in self.columns)]
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for source, variant, cells in self.rows():
            texts = [f"**{text}**" if best else text for text, best in cells]
            lines.append("| " + " | ".join([source, variant, *texts]) + " |")
        return "\n".join(lines) + "\n"


def study_table(question: Question, figures: pd.DataFrame, sources: Mapping[str, SourceConfig]) -> StudyTable | None:
    """The table of `question` from a `figure_frame`; None where no cell has any of its figures."""
    columns = tuple(match for column in question.columns for match in column.matching(figures["figure"].unique()))
    if not columns:
        return None
    index = pd.MultiIndex.from_frame(figures[_ROW].drop_duplicates())
    by_column = [_over_seeds(figures[figures["figure"] == column.figure]).reindex(index) for column in columns]
    values = index.to_frame(index=False)
    values.insert(1, "backbone", [sources[source].backbone for source in values["source"]])
    values.insert(2, "dataset", [sources[source].dataset for source in values["source"]])
    texts, best = pd.DataFrame(index=index), pd.DataFrame(index=index)
    for number, (column, statistics) in enumerate(zip(columns, by_column, strict=True)):
        statistics["seeds"] = statistics["seeds"].fillna(0).astype(int)
        for name, suffix in _STATISTICS.items():
            values[f"{column.figure}{suffix}"] = statistics[name].to_numpy()
        texts[number] = [_text(row) for row in statistics.itertuples()]
        best[number] = _is_best(statistics)
    definitions = tuple(
        merged_definitions(
            figures.loc[figures["figure"] == column.figure, ["origin", "definition"]].itertuples(index=False)
        )
        for column in columns
    )
    return StudyTable(question, columns, definitions, values, texts, best)


def _over_seeds(figures: pd.DataFrame) -> pd.DataFrame:
    """Statistics of one figure by (source, variant); what compares seeds comes before what has a value per seed."""
    grouped = figures[figures["is_per_seed"]].groupby(_ROW, sort=False)
    per_seed = grouped["value"].agg(mean="mean", sd="std", low="min", high="max", seeds="count", cells="size")
    of_seeds = figures[~figures["is_per_seed"]].set_index(_ROW)
    is_defined = of_seeds["value"].notna()
    compared = pd.DataFrame(
        {
            "mean": of_seeds["value"],
            "sd": float("nan"),
            "low": of_seeds["low"].fillna(of_seeds["value"]).where(is_defined),
            "high": of_seeds["high"].fillna(of_seeds["value"]).where(is_defined),
            "seeds": of_seeds["cells"].where(is_defined, 0),
            "cells": of_seeds["cells"],
        }
    )
    statistics = pd.concat([compared, per_seed[~per_seed.index.isin(compared.index)]])
    statistics["is_per_seed"] = ~statistics.index.isin(compared.index)
    about = figures.iloc[0]
    return statistics.assign(style=about["style"], better=about["better"])


def _is_best(statistics: pd.DataFrame) -> pd.Series:
    """bool Whether a mean is the best of its source, among rows whose figure is defined for every seed."""
    better = statistics["better"].dropna()
    means = statistics["mean"].where(statistics["seeds"] == statistics["cells"]).groupby(level="source", sort=False)
    if better.empty or better.iloc[0] == "neither":
        return pd.Series(False, index=statistics.index)
    best = means.transform("max" if better.iloc[0] == "high" else "min")
    return (statistics["mean"] == best) & (means.transform("nunique") > 1)


def _text(row: Any) -> str:
    """Mean ± standard deviation, or value (lowest … highest) of what compares seeds; an em dash where undefined."""
    if pd.isna(row.mean):
        return UNDEFINED

    def short(value: float) -> str:
        if row.style == "percent":
            return f"{100 * value:.1f}"
        size = abs(value)
        return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"

    spread = ""
    if not row.is_per_seed and row.low < row.high:
        spread = f" ({short(row.low)} … {short(row.high)})"
    elif not pd.isna(row.sd):
        spread = f" ± {short(row.sd)}"
    some = "" if row.seeds == row.cells else f" ({row.seeds:.0f} of {row.cells:.0f})"
    return f"{short(row.mean)}{spread}{' %' if row.style == 'percent' else ''}{some}"


def merged_definitions(definitions: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """One definition of a column, from (name of the cell, its definition) of all cells; several where cells differ.

    Each figure's definition has numbers of its own cell in it (clips, a chosen penalty). Definitions of the same form
    are merged, with what differs in braces: "penalty 0.01" and "penalty 0.1" become "penalty {0.01 | 0.1}". Others stay
    apart, each with the cells for which it holds.
    """
    cells_of: dict[str, list[str]] = {}
    for cell, definition in definitions:
        cells_of.setdefault(definition, []).append(cell)
    groups: list[list[str]] = []
    for definition in cells_of:
        alike = next((group for group in groups if _alike(group[0], definition)), None)
        if alike is None:
            groups.append([definition])
        else:
            alike.append(definition)
    if len(groups) == 1:
        return (_one(groups[0]),)
    return tuple(
        f"{', '.join(cell for definition in group for cell in cells_of[definition])}: {_one(group)}" for group in groups
    )


def _alike(one: str, other: str) -> bool:
    words, others = _BETWEEN.split(one), _BETWEEN.split(other)
    same = sum(a == b for a, b in zip(words, others, strict=False))
    return len(words) == len(others) and same >= _ALIKE * len(words)


def _one(definitions: Sequence[str]) -> str:
    places = zip(*(_BETWEEN.split(definition) for definition in definitions), strict=True)
    return "".join(_word(tuple(dict.fromkeys(words))) for words in places)


def _word(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    more = " | …" if len(words) > _SHOWN else ""
    return f"{{{' | '.join(words[:_SHOWN])}{more}}}"
