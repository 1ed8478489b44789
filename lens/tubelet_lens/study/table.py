"""Tables of a study: a row per (source, variant), a column per figure, mean and spread over seeds in each place."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Figure
from tubelet_lens.study.cells import Cell
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.merge_definitions import merged
from tubelet_lens.study.questions import Column, Question


@dataclass(frozen=True)
class Place:
    """One figure of one variant: a value per seed, or one value of all seeds together."""

    values: tuple[float, ...]
    """Of the seeds for which it is defined; of all of them together, that one."""
    style: str
    seeds: int
    """How many seeds it is of, those without a value among them."""
    extremes: tuple[float, float] | None = None
    """Of all seeds together: the figure's own lowest and highest. None: a value per seed."""

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None where no seed has it."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float | None:
        """Lowest over seeds (or over what the figure says); None where there is nothing."""
        return self.extremes[0] if self.extremes is not None else min(self.values, default=None)

    @property
    def high(self) -> float | None:
        """Highest, likewise."""
        return self.extremes[1] if self.extremes is not None else max(self.values, default=None)

    @property
    def counted(self) -> int:
        """Seeds behind it."""
        return self.seeds if self.extremes is not None else len(self.values)

    def text(self) -> str:
        """Mean ± standard deviation (of all seeds together: value, lowest and highest) as a person reads them; an em
        dash where there is nothing."""
        if self.mean is None:
            return "—"
        if self.extremes is not None and self.extremes[0] < self.extremes[1]:
            beside = f" ({self._short(self.extremes[0])} … {self._short(self.extremes[1])})"
        else:
            beside = f" ± {self._short(self.spread)}" if self.spread is not None else ""
        return f"{self._short(self.mean)}{beside}{' %' if self.style == 'percent' else ''}{self._some}"

    def _short(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.style == "percent" else _short(value)

    @property
    def whole(self) -> bool:
        """Whether it is defined for every seed."""
        return self.counted == self.seeds

    @property
    def _some(self) -> str:
        return "" if self.whole else f" ({self.counted} of {self.seeds})"


@dataclass(frozen=True)
class Row:
    """One variant on one source."""

    source: str
    backbone: str
    dataset: str
    variant: str
    seeds: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Table:
    """The answer to one question."""

    question: Question
    columns: tuple[Column, ...]
    """Those of the question's columns that any cell has a figure for."""
    definitions: tuple[tuple[str, ...], ...]
    """What each column is, from the figures of all cells: one definition, or several where cells differ."""
    better: tuple[str, ...]
    rows: tuple[Row, ...]

    def best(self, column: int, source: str) -> float | None:
        """The best mean of a column among one source's rows; None where neither direction is better."""
        direction = self.better[column]
        places = [row.places[column] for row in self.rows if row.source == source]
        means = [place.mean for place in places if place.mean is not None and place.whole]
        if direction == "neither" or len(means) < 2 or len(set(means)) == 1:
            return None
        return max(means) if direction == "high" else min(means)

    def csv(self) -> str:
        """One line per row; mean, standard deviation, lowest, highest and number of seeds of each figure."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [
            f"{column.figure}{suffix}" for column in self.columns for suffix in ("", ".sd", ".low", ".high", ".seeds")
        ]
        writer.writerow(["source", "backbone", "dataset", "variant", *names])
        for row in self.rows:
            told = [
                part
                for place in row.places
                for part in (place.mean, place.spread, place.low, place.high, place.counted)
            ]
            writer.writerow([row.source, row.backbone, row.dataset, row.variant, *told])
        return out.getvalue()

    def markdown(self) -> str:
        """As a table of a markdown page; the best of each source is bold."""
        # A bar would end the cell.
        heads = ["source", "variant", *(column.title.replace("|", "\\|") for column in self.columns)]
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for row in self.rows:
            texts = []
            for number, place in enumerate(row.places):
                best = place.mean is not None and place.mean == self.best(number, row.source)
                texts.append(f"**{place.text()}**" if best else place.text())
            lines.append("| " + " | ".join([row.source, row.variant, *texts]) + " |")
        return "\n".join(lines) + "\n"


def table(
    question: Question,
    config: StudyConfig,
    done: Sequence[Cell],
    evaluations: Mapping[str, Evaluation],
    derived: Mapping[str, Sequence[Figure]],
    of_seeds: Mapping[tuple[str, str], Sequence[Figure]],
) -> Table | None:
    """The table of `question` over finished cells; None where no cell has any of its figures.

    Args:
        question: What is asked.
        config: Of the study.
        done: Finished cells.
        evaluations: By cell.
        derived: Further figures by cell.
        of_seeds: Figures of all seeds of a (source, variant) together.
    """
    grouped: dict[tuple[str, str], list[dict[str, Figure]]] = {}
    told: dict[str, list[tuple[str, Figure]]] = {}
    for cell in done:
        figures = {figure.name: figure for figure in evaluations[cell.name].figures()}
        figures |= {figure.name: figure for figure in derived.get(cell.name, ())}
        grouped.setdefault((cell.source, cell.variant), []).append(figures)
        for name, figure in figures.items():
            told.setdefault(name, []).append((cell.name, figure))
    together = {key: {figure.name: figure for figure in shared} for key, shared in of_seeds.items()}
    for (source, variant), figures in together.items():
        for name, figure in figures.items():
            told.setdefault(name, []).append((f"{source}/{variant}", figure))
    columns = tuple(found for column in question.columns for found in column.found(told))
    if not columns:
        return None
    rows = []
    for (source, variant), group in grouped.items():
        about, shared = config.sources[source], together.get((source, variant), {})
        places = tuple(
            _of_all(shared[column.figure], len(group)) if column.figure in shared else _by_seed(column.figure, group)
            for column in columns
        )
        rows.append(Row(source, about.backbone, about.dataset, variant, len(group), places))
    return Table(
        question,
        columns,
        tuple(merged((cell, figure.definition) for cell, figure in told[column.figure]) for column in columns),
        tuple(told[column.figure][0][1].better for column in columns),
        tuple(rows),
    )


def _of_all(figure: Figure, seeds: int) -> Place:
    if figure.value is None:
        return Place((), figure.style, seeds)
    value = figure.value
    low, high = (value if end is None else end for end in (figure.low, figure.high))
    return Place((value,), figure.style, seeds, (low, high))


def _by_seed(name: str, group: Sequence[Mapping[str, Figure]]) -> Place:
    found = [figures[name] for figures in group if name in figures]
    values = tuple(figure.value for figure in found if figure.value is not None)
    return Place(values, found[0].style if found else "number", len(found))


def _short(value: float) -> str:
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}"
