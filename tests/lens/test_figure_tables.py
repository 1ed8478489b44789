"""Laws of the specification tables: what a metric may report, and what each figure is read against."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import tubelet_lens.metrics
import tubelet_lens.steering
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.figure_table import FigureSpec, FigureTable, spread

METRICS = [
    import_module(f"{package.__name__}.{module.name}")
    for package in (tubelet_lens.metrics, tubelet_lens.steering)
    for module in iter_modules(package.__path__)
]
TABLES = [module.FIGURES for module in METRICS if hasattr(module, "FIGURES")]


def pattern(name: str) -> re.Pattern[str]:
    """What the names of a row's figures look like."""
    return re.compile(re.sub(r"\\\{[^}]*\\\}", "[a-z0-9_.]*", re.escape(name)))


def reports(table: FigureTable, name: str) -> bool:
    return any(pattern(table.name(spec)).fullmatch(name) for spec in table)


@pytest.mark.parametrize("module", METRICS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_metric_makes_figures_from_its_table_alone(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "Figure" not in called


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.section)
def test_every_row_is_filled_somewhere(table: FigureTable) -> None:
    [source] = {str(module.__file__) for module in METRICS if getattr(module, "FIGURES", None) is table}
    # Rows of class edits are filled where both of these sections are made.
    edits = Path(source).with_name("class_edits.py")
    text = Path(source).read_text() + (edits.read_text() if edits.exists() else "")
    for spec in table:
        parts = spec.key.split("_")
        starts = ["_".join(parts[:end]) for end in range(1, len(parts) + 1)]
        assert any(re.search(rf'fill\(\s*f?"{start}|"{start}"', text) for start in starts), spec.key


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.section)
def test_a_null_is_a_figure_of_some_table_or_exact_with_a_reason(table: FigureTable) -> None:
    for spec in table:
        if spec.null.startswith("exact: "):
            assert len(spec.null) > len("exact: ") + 10, spec.key
        elif spec.null:
            name = re.sub(r"\{[^}]*\}", "x", spec.null)
            assert any(reports(other, name) for other in TABLES), spec.null


def test_a_headline_says_what_it_is_read_against() -> None:
    with pytest.raises(ValueError, match="read against"):
        FigureSpec("a", "A", "Definition.", n_of="tokens", headline=True)


def test_a_figure_that_is_not_in_the_table_cannot_be_made() -> None:
    table = FigureTable("s", FigureSpec("a", "A of {what}", "Mean of {what}.", n_of="tokens", name="s.a_{what}"))
    figure = table.fill("a", 1.0, 3, what="b", ends=(0.5, 2.0))
    assert (figure.name, figure.title, figure.definition) == ("s.a_b", "A of b", "Mean of b.")
    assert (figure.value, figure.low, figure.high, figure.n, figure.n_of) == (1.0, 0.5, 2.0, 3, "tokens")
    with pytest.raises(KeyError):
        table.fill("c", 1.0, 3)
    with pytest.raises(ValueError, match="one key"):
        FigureTable("s", *table, *table)


def test_the_spread_of_draws_is_mean_and_ends() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, (1.0, 6.0))
    assert spread([]) == (None, None)


def unlisted(evaluation: Evaluation, tables: list[FigureTable] = TABLES) -> list[str]:
    """Figures of the tables' sections that none of the rows describes."""
    sections = {table.section for table in tables}
    names = [figure.name for figure in evaluation.figures() if figure.name.split(".")[0] in sections]
    return [name for name in names if not any(reports(table, name) for table in tables)]


def unreported(evaluation: Evaluation, tables: list[FigureTable] = TABLES) -> list[str]:
    """Rows without a condition, of sections that the evaluation has, that no figure fills."""
    there = {section.name for section in evaluation.sections}
    names = [figure.name for figure in evaluation.figures()]
    return [
        table.name(spec)
        for table in tables
        for spec in table
        if table.section in there and not spec.when and not any(pattern(table.name(spec)).fullmatch(n) for n in names)
    ]
