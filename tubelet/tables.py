"""Tables that results are shown as: text in a terminal, HTML in a notebook, a pandas DataFrame on request.

    class TrainResult(Tabular):
        def table(self) -> Table: ...

A result derives from `Tabular` and says what its table holds; `repr`, `_repr_html_` and `to_pandas` follow.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from tubelet.errors import TubeletError, nearest
from tubelet.formats import UNDEFINED, number

if TYPE_CHECKING:
    import pandas

_ROWS_SHOWN = 20
_CELL_WIDTH = 80


class Tabular:
    """Base of results that are shown as a table. With a dataclass: `@dataclass(repr=False)`."""

    def table(self) -> Table:
        """What is shown."""
        raise NotImplementedError

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame, all rows, values as they are.

        Raises:
            TubeletError: pandas is not installed.
        """
        table = self.table()
        try:
            import pandas
        except ImportError as error:
            raise TubeletError(
                "to_pandas() needs pandas, not installed here", "Run: pip install 'tubelet[lens]'"
            ) from error
        return pandas.DataFrame({name: table[name] for name in table.columns})

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


class Table(Tabular):
    """Named columns of equal length.

    Args:
        columns: Values by column name, in order; None and NaN are undefined.
        title: Stands above the table.
        notes: Lines below it.
        definitions: What a column means, by name; shown in a notebook when its head is pointed at.
        texts: How to show the values of some columns; without, numbers get about four digits.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        *,
        title: str = "",
        notes: Sequence[str] = (),
        definitions: Mapping[str, str] | None = None,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._columns = dict(columns)
        lengths = {len(values) for values in self._columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        self._rows = lengths.pop() if lengths else 0
        self._texts = dict(texts or {})
        self.title, self.notes, self.definitions = title, tuple(notes), dict(definitions or {})

    @classmethod
    def of_rows(cls, names: Sequence[str], rows: Sequence[Sequence[Any]], **more: Any) -> Table:
        """From rows of equal length; `more` as for the class."""
        return cls({name: [row[place] for row in rows] for place, name in enumerate(names)}, **more)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self._columns)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, name: str) -> Sequence[Any]:
        """The values of one column.

        Raises:
            TubeletError: there is no such column.
        """
        if name not in self._columns:
            raise TubeletError(f"The table has no column '{name}'", nearest(name, self._columns))
        return self._columns[name]

    def table(self) -> Table:
        """The table itself."""
        return self

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row, values by column name."""
        for values in zip(*self._columns.values(), strict=True):
            yield dict(zip(self._columns, values, strict=True))

    def sort_by(self, name: str, *, descending: bool = False) -> Table:
        """The rows in the order of column `name`; undefined values last, equal ones in their old order.

        Raises:
            TubeletError: there is no such column.
        """
        values = self[name]
        defined = [row for row in range(self._rows) if not _is_undefined(values[row])]
        undefined = [row for row in range(self._rows) if _is_undefined(values[row])]
        return self._taken(sorted(defined, key=lambda row: values[row], reverse=descending) + undefined)

    def head(self, rows: int = 10) -> Table:
        """The first `rows`."""
        return self._taken(range(min(rows, self._rows)))

    def _taken(self, rows: Sequence[int]) -> Table:
        columns = {name: [values[row] for row in rows] for name, values in self._columns.items()}
        texts = {name: [values[row] for row in rows] for name, values in self._texts.items()}
        return Table(columns, title=self.title, notes=self.notes, definitions=self.definitions, texts=texts)

    def text(self, rows: int = _ROWS_SHOWN) -> str:
        """As plain text, at most `rows` of it."""
        cells = [self.columns, *self._shown(rows)]
        widths = [min(_CELL_WIDTH, max(len(row[place]) for row in cells)) for place in range(len(self.columns))]
        is_right = [self._is_numeric(name) for name in self.columns]
        lines = [self.title] if self.title else []
        for row in cells:
            fitted = [_shortened(cell, width) for cell, width in zip(row, widths, strict=True)]
            aligned = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(fitted, widths, is_right, strict=True)
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([*lines, *self._more(rows), *self.notes])

    def html(self, rows: int = _ROWS_SHOWN) -> str:
        """As an HTML table, at most `rows` of it."""
        heads = "".join(
            f'<th scope="col" title="{html.escape(self.definitions.get(name, ""))}">{html.escape(name)}</th>'
            for name in self.columns
        )
        align = ["right" if self._is_numeric(name) else "left" for name in self.columns]
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align: {side}">{html.escape(cell)}</td>'
                for cell, side in zip(row, align, strict=True)
            )
            + "</tr>"
            for row in self._shown(rows)
        )
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        below = "".join(f"<p>{html.escape(line)}</p>" for line in [*self._more(rows), *self.notes])
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"

    def _shown(self, rows: int) -> list[list[str]]:
        columns = [
            [
                self._texts[name][row] if name in self._texts else _cell(values[row])
                for row in range(min(rows, len(self)))
            ]
            for name, values in self._columns.items()
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def _more(self, rows: int) -> list[str]:
        return [f"... {self._rows - rows:,} more rows"] if self._rows > rows else []

    def _is_numeric(self, name: str) -> bool:
        values = [value for value in self._columns[name][:_ROWS_SHOWN] if value is not None]
        return bool(values) and all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def _is_undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any) -> str:
    if _is_undefined(value):
        return UNDEFINED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(float(value)) if isinstance(value, Real) else " ".join(str(value).split())


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
