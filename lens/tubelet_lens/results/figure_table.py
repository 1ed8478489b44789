"""Specification of a metric's figures: one row per figure, filled by key.

    FIGURES = FigureTable("reconstruction", FigureSpec("fvu", "FVU", "sum ||x - x̂||² / ...", n_of="tokens", ...))
    FIGURES.fill("fvu", value, tokens)   ─▶ Figure "reconstruction.fvu"

Metrics make figures in this way only, so a table lists everything that its metric can report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tubelet_lens.results.section import Figure, Subject


@dataclass(frozen=True)
class FigureSpec:
    """One row. `name`, `title`, `definition` and `n_of` may hold `{words}` that are filled in with the value.

    Attributes:
        key: Name of the row within its table.
        title: Displayed name; figures of one title form one row of the report, one column per subject.
        definition: Formula and conventions, readable alone.
        n_of: What `n` counts.
        style: How to print the value.
        better: Which direction is better, if either.
        headline: Shown at the top of the report and in the terminal. A headline needs a `null`.
        null: What the figure is read against: the name of a figure (`{words}` as in `name`), or `exact: ` and the
            reason why a fixed number is enough.
        interval: What `low` and `high` are; empty where there are none.
        name: The figure's name; empty: `section.key`.
        when: Under which condition the figure is reported; empty: whenever the section is.
    """

    key: str
    title: str
    definition: str
    n_of: str
    style: Literal["number", "percent", "count", "seconds"] = "number"
    better: Literal["high", "low", "neither"] = "neither"
    headline: bool = False
    null: str = ""
    interval: str = ""
    name: str = ""
    when: str = ""

    def __post_init__(self) -> None:
        if self.headline and not self.null:
            raise ValueError(f"the headline {self.key} does not say what it is read against")


class FigureTable:
    """The figures of one section.

    Args:
        section: Name of the section.
        *specs: Rows, in no particular order.
    """

    def __init__(self, section: str, *specs: FigureSpec) -> None:
        self.section = section
        self._by_key = {spec.key: spec for spec in specs}
        if len(self._by_key) < len(specs):
            raise ValueError(f"two figures of {section} have one key")

    def __iter__(self) -> Iterator[FigureSpec]:
        return iter(self._by_key.values())

    def name(self, spec: FigureSpec) -> str:
        """Name of the row's figures, `{words}` not filled in."""
        return spec.name or f"{self.section}.{spec.key}"

    def fill(
        self,
        key: str,
        value: float | None,
        n: int,
        *,
        subject: Subject = "sae",
        ends: tuple[float, float] | None = None,
        headline: bool = True,
        **words: object,
    ) -> Figure:
        """The figure of row `key`.

        Args:
            key: Of the row.
            value: None: undefined on these data.
            n: Number of samples it is computed from.
            subject: What it is about; also the word `{subject}`.
            ends: `low` and `high`.
            headline: False: not a headline here, whatever the row's default.
            words: Fill the row's `{words}`.

        Raises:
            KeyError: the table has no such row.
        """
        spec = self._by_key[key]
        words = {"subject": subject, **words}
        low, high = ends or (None, None)
        return Figure(
            name=self.name(spec).format(**words),
            title=spec.title.format(**words),
            subject=subject,
            value=value,
            low=low,
            high=high,
            n=n,
            n_of=spec.n_of.format(**words),
            definition=spec.definition.format(**words),
            style=spec.style,
            better=spec.better,
            headline=spec.headline and headline,
        )


def spread(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Mean of repeated draws, and the lowest and highest; None where there are no draws."""
    if not values:
        return None, None
    return float(sum(values) / len(values)), (float(min(values)), float(max(values)))
