"""Output of a study: tables (Markdown, CSV), plots (PNG), and one page that shows them all.

study.html · study.md · tables/NAME.csv · plots/NAME.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tubelet_lens.report.page_templates import page_environment
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.study.cells import Cell
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.questions import QUESTIONS
from tubelet_lens.study.shared_figures import equal_time_figures, figures_over_seeds
from tubelet_lens.study.study_plots import curves, pareto
from tubelet_lens.study.study_tables import StudyTable, figure_frame, study_table

_CURVES = (
    ("coherence.lags", "Autocorrelation against distance in time", "coherence"),
    (
        "ablation.curve",
        "Accuracy as latents are taken away, most important first (dotted: random)",
        "ablation",
    ),
    (
        "backbone_ablation.curve",
        "The same with latents switched off in the running backbone",
        "backbone",
    ),
    (
        "monosemanticity.distribution",
        "Monosemanticity of the latents in ascending order (dashed: raw dimensions)",
        "interpretability",
    ),
    ("scope.spatial_distribution", "How far latents follow a shifted view, in space", "scope"),
    ("scope.temporal_distribution", "How far latents follow a shifted window, in time", "scope"),
)
"""Curves of the evaluations to plot for all variants: name, title, question."""


@dataclass(frozen=True)
class Plot:
    """One image of the page."""

    file: str
    title: str
    question: str


def write_results(
    config: StudyConfig, done: Sequence[Cell], failures: Mapping[str, str]
) -> tuple[Path, dict[str, pd.DataFrame]]:
    """Write tables, plots and the page of the finished cells; returns the page's path and the tables by question."""
    evaluations = {cell.name: cell.evaluation() for cell in done}
    figures = figure_frame(done, evaluations, equal_time_figures(done, evaluations), figures_over_seeds(done))
    answers = (study_table(question, figures, config.sources) for question in QUESTIONS)
    tables = [table for table in answers if table is not None]
    plots = _plots(config, done, evaluations)
    for table in tables:
        path = config.out / "tables" / f"{table.question.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table.csv())
    (config.out / "study.md").write_text(_markdown(tables, plots, failures))
    environment = page_environment("tubelet_lens.report")
    page = config.out / "study.html"
    page.write_text(
        environment.get_template("study.html").render(
            tables=tables,
            plots=plots,
            failures=failures,
            cells=len(done),
            seeds=config.seeds,
            sources=config.sources,
        )
    )
    return page, {table.question.name: table.values for table in tables}


def _plots(config: StudyConfig, done: Sequence[Cell], evaluations: Mapping[str, Evaluation]) -> list[Plot]:
    folder = config.out / "plots"
    plots = []
    if pareto(done, evaluations, folder / "pareto.png"):
        plots.append(Plot("plots/pareto.png", "Reconstruction against coherence", "coherence"))
    for name, title, question in _CURVES:
        file = f"{name.replace('.', '_')}.png"
        if curves(done, evaluations, name, folder / file):
            plots.append(Plot(f"plots/{file}", title, question))
    return plots


def _markdown(tables: Sequence[StudyTable], plots: Sequence[Plot], failures: Mapping[str, str]) -> str:
    parts = []
    for table in tables:
        parts.append(f"## {table.question.title}\n\n{table.question.lead}\n\n{table.markdown()}")
        parts += [f"![{plot.title}]({plot.file})\n" for plot in plots if plot.question == table.question.name]
    if failures:
        listed = "\n".join(f"- {name}: {reason}" for name, reason in failures.items())
        parts.append(f"## Cells that failed\n\n{listed}\n")
    return "\n".join(parts)
