"""Tables of a study: a row per (source, variant), a column per figure, mean and spread over seeds in each place."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tubelet_lens.evaluation import Evaluation
from tubelet_lens.section import Figure
from tubelet_lens.study.cells import Cell
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.questions import Column, Question


@dataclass(frozen=True)
class Place:
    """One figure of one variant over its seeds."""

    values: tuple[float, ...]
    """Of the seeds for which it is defined."""
    style: str
    seeds: int
    """How many values there could be."""

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None where no seed has it."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None below two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """Mean ± standard deviation as a person reads them; an em dash where there is nothing."""
        if self.mean is None:
            return "—"
        if self.style == "percent":
            spread = f" ± {100 * self.spread:.1f}" if self.spread is not None else ""
            return f"{100 * self.mean:.1f}{spread} %{self._some}"
        spread = f" ± {_short(self.spread)}" if self.spread is not None else ""
        return f"{_short(self.mean)}{spread}{self._some}"

    @property
    def whole(self) -> bool:
        """Whether it is defined for every seed."""
        return len(self.values) == self.seeds

    @property
    def _some(self) -> str:
        return "" if self.whole else f" ({len(self.values)} of {self.seeds})"


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
    definitions: tuple[str, ...]
    """What each column is, from the figures themselves."""
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
        """One line per row; mean, standard deviation and number of seeds of each figure."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [f"{column.figure}{suffix}" for column in self.columns for suffix in ("", ".sd", ".seeds")]
        writer.writerow(["source", "backbone", "dataset", "variant", *names])
        for row in self.rows:
            told = [part for place in row.places for part in (place.mean, place.spread, len(place.values))]
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
    seeds: dict[tuple[str, str], int] = {}
    for cell in done:
        figures = {figure.name: figure for figure in evaluations[cell.name].figures()}
        figures |= {figure.name: figure for figure in derived.get(cell.name, ())}
        key = (cell.source, cell.variant)
        grouped.setdefault(key, []).append(figures)
        seeds[key] = seeds.get(key, 0) + 1
    for key, shared in of_seeds.items():
        grouped[key].append({figure.name: figure for figure in shared})
    known = {name: figure for group in grouped.values() for figures in group for name, figure in figures.items()}
    columns = tuple(found for column in question.columns for found in column.found(known))
    if not columns:
        return None
    rows = []
    for (source, variant), group in grouped.items():
        about = config.sources[source]
        places = tuple(
            Place(
                tuple(
                    value
                    for figures in group
                    if column.figure in figures and (value := figures[column.figure].value) is not None
                ),
                known[column.figure].style,
                # What is said of all seeds together is one value.
                sum(column.figure in figures for figures in group),
            )
            for column in columns
        )
        rows.append(Row(source, about.backbone, about.dataset, variant, seeds[source, variant], places))
    return Table(
        question,
        columns,
        tuple(known[column.figure].definition for column in columns),
        tuple(known[column.figure].better for column in columns),
        tuple(rows),
    )


def _short(value: float) -> str:
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}"
