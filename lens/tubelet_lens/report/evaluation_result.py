"""What `evaluate` returns: every figure, a table of the headline figures, one row per latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tubelet.formats import styled
from tubelet.tables import Table, Tabular
from tubelet_lens.report.html_report import SUBJECTS, comparisons, count, range_of, render_report, why_undefined
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.latent_table import LatentEffect, write_effects, write_latents
from tubelet_lens.results.section import Figure


@dataclass(frozen=True, eq=False, repr=False)
class EvaluationResult(Tabular):
    """One evaluation; shown as the table of its headline figures."""

    evaluation: Evaluation
    latent_columns: pa.Table
    """One row per latent, see `latent_table`."""
    effects: tuple[LatentEffect, ...] = ()
    """What edits of single latents do, where the backbone ran."""

    @property
    def latents(self) -> Table:
        """Every statistic of every latent; undefined values are NaN."""
        columns = {name: self.latent_columns[name].to_numpy() for name in self.latent_columns.column_names}
        definitions = {
            field.name: (field.metadata or {}).get(b"definition", b"").decode() for field in self.latent_columns.schema
        }
        return Table(columns, title=f"{len(self.latent_columns):,} latents", definitions=definitions)

    def table(self) -> Table:
        """A row per headline figure: its value, interval, the same figure of controls, and what it counts."""
        rows, texts = [], []
        for figure in self._headlines():
            controls = ", ".join(
                f"{SUBJECTS[other.subject]} {styled(other.value, other.style)}"
                for other in comparisons(self.evaluation, figure)
            )
            rows.append(
                (figure.title, figure.value, figure.low, figure.high, controls, figure.n, figure.n_of, figure.name)
            )
            texts.append([styled(value, figure.style) for value in (figure.value, figure.low, figure.high)])
        covered = self.evaluation.coverage
        return Table.of_rows(
            ("figure", "value", "low", "high", "controls", "n", "of", "name"),
            rows,
            title=f"{self.evaluation.sae['run']} on {self.evaluation.store['name']}: {covered.clips:,} clips of "
            f"{covered.videos:,} videos ({covered.split.replace('_', ' ')})",
            notes=self.evaluation.cautions,
            texts={name: [row[place] for row in texts] for place, name in enumerate(("value", "low", "high"))},
        )

    def lines(self) -> Iterator[str]:
        """The headline figures for a terminal, each with its count and controls; then what limits the evaluation."""
        for figure in self._headlines():
            parts = [f"{_text(figure)}{range_of(figure)}, from {count(figure)}"]
            parts += [f"{SUBJECTS[other.subject]}: {_text(other)}" for other in comparisons(self.evaluation, figure)]
            yield f"{figure.title}: {'; '.join(parts)}"
        yield from self.evaluation.cautions

    def write(self, out: Path) -> Path:
        """Write `evaluation.json`, `report.html`, `latents.parquet` and, where the backbone ran, `effects.parquet` into
        `out`; the report's path."""
        out.mkdir(parents=True, exist_ok=True)
        self.evaluation.write(out / "evaluation.json")
        write_latents(self.latent_columns, out)
        write_effects(self.effects, out)
        report = out / "report.html"
        report.write_text(render_report(self.evaluation))
        return report

    def _headlines(self) -> Iterator[Figure]:
        return (figure for figure in self.evaluation.figures() if figure.headline)


def _text(figure: Figure) -> str:
    return styled(figure.value, figure.style) + why_undefined(figure)
