"""Tables of results, as text, HTML and pandas."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from tubelet.errors import TubeletError
from tubelet.tables import Table, Tabular

TABLE = Table(
    {"name": ["a", "b<i>", "c"], "value": np.array([0.5, float("nan"), -5e-17]), "n": [1234, None, 2]},
    title="Three things",
    notes=("As found.",),
)


def test_a_table_as_text_has_every_cell_once_and_undefined_ones_as_a_dash() -> None:
    lines = repr(TABLE).splitlines()
    assert lines[0] == "Three things"
    assert lines[-1] == "As found."
    assert [line.split() for line in lines[1:-1]] == [
        ["name", "value", "n"],
        ["a", "0.500", "1,234"],
        ["b<i>", "—", "—"],
        ["c", "0", "2"],
    ]


def test_numbers_are_aligned_at_their_ends() -> None:
    ends = {len(line) for line in repr(TABLE).splitlines()[1:-1]}
    assert len(ends) == 1


def test_html_escapes_what_cells_hold() -> None:
    page = TABLE._repr_html_()
    assert "b&lt;i&gt;" in page
    assert "<i>" not in page


def test_long_tables_say_how_many_rows_are_left_out() -> None:
    table = Table({"row": list(range(1000))})
    assert "980 more rows" in repr(table)
    assert "980 more rows" in table._repr_html_()
    assert len(repr(table).splitlines()) == 22


def test_sorting_puts_undefined_values_last_in_both_directions() -> None:
    assert list(TABLE.sort_by("value")["name"]) == ["c", "a", "b<i>"]
    assert list(TABLE.sort_by("value", descending=True)["name"]) == ["a", "c", "b<i>"]
    with pytest.raises(TubeletError, match=r"no column 'vlue'.*'value'"):
        TABLE.sort_by("vlue")


def test_pandas_gets_all_rows_unrounded() -> None:
    pandas = pytest.importorskip("pandas")
    frame = TABLE.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["name", "value", "n"]
    assert frame["value"][2] == -5e-17


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: object) -> object:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TubeletError, match=r"needs pandas.*tubelet\[lens\]"):
        TABLE.to_pandas()


def test_a_result_shows_its_table() -> None:
    class Result(Tabular):
        def table(self) -> Table:
            return TABLE

    assert repr(Result()) == repr(TABLE)
    assert Result()._repr_html_() == TABLE._repr_html_()
