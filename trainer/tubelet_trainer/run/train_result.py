"""What a training run left: its SAEs with their final figures, as a table; of several also as files and a plot.

saes.csv, saes.md    a row per SAE
saes.png             FVU against temporal coherence (with matplotlib)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.durable_files import replace_file
from tubelet.errors import TubeletError, nearest
from tubelet.formats import UNDEFINED, number
from tubelet.tables import Table, Tabular
from tubelet_trainer.sae.sae_files import RECORD, load_record, load_sae

if TYPE_CHECKING:
    from tubelet_trainer.sae.model import SAE

_DEFINITIONS = {
    "k": "Active latents per token, as configured",
    "sparsity": "Weight of the sparsity penalty",
    "lambda_t": "Weight of the temporal contrast",
    "lambda_s": "Weight of the spatial contrast",
    "lambda_smooth": "Weight of the smoothness penalty",
    "lambda_slow": "Weight of the reconstruction from the prefix",
    "fvu": "Fraction of variance unexplained on held-out videos; 1 is as good as the mean",
    "l0": "Mean number of active latents per token",
    "dead": "Share of latents that are never active",
    "coherence": "Mean cosine between the codes of one patch at successive latent steps, on held-out videos",
    "other clips": "The same between tokens of different clips: what a dictionary without coherence has",
}


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE of a run.

    Attributes:
        name: Within the run; empty where it is the only one.
        folder: Holds `sae.safetensors` and `sae.json`.
        hook: Of the backbone.
        kind: `topk`, `batchtopk`, ...
        latents: F.
        fvu: Fraction of variance unexplained on the held-out videos (without any: in the last training steps).
        l0: Mean number of active latents per token, on the same tokens.
        dead: Share of latents that are active on none of them.
        tokens: Training tokens.
        k: Active latents per token, for the kinds that have it.
        sparsity: Weight of the penalty, for the kinds that have one.
        weights: Of the objective, those above 0: `lambda_t` and so on.
        coherence: Mean cosine between the codes of one patch at successive latent steps of held-out clips; None where
            it was not measured (a run of one SAE, no held-out videos, one latent step).
        coherence_other: The same between tokens of different clips.
    """

    name: str
    folder: Path
    hook: str
    kind: str
    latents: int
    fvu: float | None
    l0: float | None
    dead: float | None
    tokens: int
    k: int | None = None
    sparsity: float | None = None
    weights: dict[str, float] = field(default_factory=dict)
    coherence: float | None = None
    coherence_other: float | None = None

    def load(self, device: str = "cpu") -> SAE:
        """The SAE, ready for inference."""
        return load_sae(self.folder, device)


@dataclass(frozen=True, repr=False)
class TrainResult(Tabular):
    """The SAEs of a run, in the order of their names.

    Attributes:
        out: The run's folder; the result itself may be given in place of a run's path.
        saes: At least one on the first process of a run, none on the others.
    """

    out: Path
    saes: tuple[TrainedSAE, ...]

    def __fspath__(self) -> str:
        return str(self.out)

    def __truediv__(self, name: str) -> Path:
        """A path in the run's folder."""
        return self.out / name

    def __len__(self) -> int:
        return len(self.saes)

    def __iter__(self) -> Iterator[TrainedSAE]:
        return iter(self.saes)

    def __getitem__(self, name: str) -> TrainedSAE:
        """The SAE called `name`.

        Raises:
            TubeletError: there is none.
        """
        by_name = {sae.name: sae for sae in self.saes}
        if name not in by_name:
            raise TubeletError(f"{self.out} holds no SAE '{name}'", nearest(name, by_name))
        return by_name[name]

    def load(self, name: str | None = None, device: str = "cpu") -> SAE:
        """The SAE called `name`, or the run's only one, ready for inference.

        Raises:
            TubeletError: there is no such SAE, or the run has several and no name is given.
        """
        if name is not None:
            return self[name].load(device)
        if len(self.saes) > 1:
            names = ", ".join(sae.name for sae in self.saes)
            raise TubeletError(f"{self.out} holds {len(self.saes)} SAEs", f"Name one: {names}")
        return self.saes[0].load(device)

    def table(self) -> Table:
        """A row per SAE; settings that no SAE has, and figures that were not measured, have no column."""
        columns: dict[str, list[Any]] = {"name": [sae.name or self.out.name for sae in self.saes]}
        for column in ("hook", "kind", "latents", "k", "sparsity"):
            columns[column] = [getattr(sae, column) for sae in self.saes]
        for weight in dict.fromkeys(name for sae in self.saes for name in sae.weights):
            columns[weight] = [sae.weights.get(weight, 0.0) for sae in self.saes]
        for column in ("fvu", "l0", "dead", "coherence"):
            columns[column] = [getattr(sae, column) for sae in self.saes]
        columns["other clips"] = [sae.coherence_other for sae in self.saes]
        for optional in ("k", "sparsity", "coherence", "other clips"):
            if all(value is None for value in columns[optional]):
                del columns[optional]
        tokens = f", {self.saes[0].tokens:,} tokens" if self.saes else ""
        definitions = {name: text for name, text in _DEFINITIONS.items() if name in columns}
        notes = [f"{name}: {definitions[name].lower()}" for name in ("coherence", "other clips") if name in columns]
        texts = {"dead": [UNDEFINED if sae.dead is None else f"{sae.dead:.1%}" for sae in self.saes]}
        title = f"Training run {self.out}{tokens}"
        return Table(columns, title=title, notes=notes, definitions=definitions, texts=texts)

    def write(self) -> str | None:
        """Write saes.csv, saes.md and saes.png into the run's folder; why there is no plot, None if there is one."""
        table = self.table()
        rows = [list(table.columns), *([row[name] for name in table.columns] for row in table.rows())]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        replace_file(self.out / "saes.csv", text.getvalue().encode())
        replace_file(self.out / "saes.md", _markdown(table, rows).encode())
        if not any(sae.coherence is not None and sae.fvu is not None for sae in self.saes):
            return "no plot of FVU against coherence: coherence could not be measured on held-out videos"
        try:
            image = _plot(self.saes)
        except ImportError:
            return "no plot of FVU against coherence: matplotlib is not installed (pip install 'tubelet[lens]')"
        replace_file(self.out / "saes.png", image)
        return None


def read_run(out: Path | str) -> TrainResult:
    """The finished SAEs in the run folder `out`.

    Raises:
        TubeletError: there is none.
    """
    out = Path(out)
    folders = [out] if (out / RECORD).is_file() else sorted(path.parent for path in out.glob(f"*/{RECORD}"))
    if not folders:
        load_record(out)
    return TrainResult(out, tuple(_trained(out, folder) for folder in folders))


def _trained(out: Path, folder: Path) -> TrainedSAE:
    record = load_record(folder)
    known: dict[str, Any] = record.provenance
    metrics, objective = known.get("metrics", {}), known.get("objective", {})
    return TrainedSAE(
        name="" if folder == out else folder.name,
        folder=folder,
        hook=known.get("hook", ""),
        kind=record.config.kind,
        latents=record.config.latents_for(record.channels),
        fvu=metrics.get("fvu"),
        l0=metrics.get("l0"),
        dead=metrics.get("dead"),
        tokens=known.get("tokens", 0),
        k=getattr(record.config, "k", None),
        sparsity=getattr(record.config, "sparsity", None),
        weights={name: weight for name, weight in objective.items() if name.startswith("lambda_") and weight},
        coherence=metrics.get("coherence"),
        coherence_other=metrics.get("coherence_other"),
    )


def _markdown(table: Table, rows: list[list[Any]]) -> str:
    def cell(column: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.1%}" if column == "dead" else number(value)
        return "" if value is None else str(value).replace("|", "\\|")

    names, *figures = rows
    lines = [[cell(*pair) for pair in zip(table.columns, row, strict=True)] for row in figures]
    head, *body = [f"| {' | '.join(line)} |" for line in [names, *lines]]
    notes = [f"\n{note}." for note in table.notes]
    return "\n".join([f"# {table.title}\n", head, f"|{'---|' * len(names)}", *body, *notes]) + "\n"


def _plot(saes: tuple[TrainedSAE, ...]) -> bytes:
    """FVU against temporal coherence, a point per SAE, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(sae, sae.coherence, sae.fvu) for sae in saes if sae.coherence is not None and sae.fvu is not None]
    for kind in dict.fromkeys(sae.kind for sae, _, _ in points):
        _, coherences, fvus = zip(*(point for point in points if point[0].kind == kind), strict=True)
        axes.scatter(coherences, fvus, label=kind)
    axes.margins(0.15)
    middle = sum(axes.get_xlim()) / 2
    for place, (sae, x, y) in enumerate(sorted(points, key=lambda point: point[1])):
        # Toward the middle, above and below in turns: names of neighbors do not overlap.
        side = "right" if x > middle else "left"
        offset = (-6 if side == "right" else 6, 6 if place % 2 else -12)
        axes.annotate(sae.name, (x, y), xytext=offset, textcoords="offset points", fontsize=7, ha=side)
    axes.set_xlabel("temporal coherence (mean cosine of codes at successive latent steps)")
    axes.set_ylabel("FVU on held-out videos")
    axes.legend(loc="best")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
