"""What a training run left: its SAEs with their final figures, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.errors import TubeletError, nearest
from tubelet.tables import Table, Tabular
from tubelet_trainer.sae.sae_files import RECORD, load_record, load_sae

if TYPE_CHECKING:
    from tubelet_trainer.sae.model import SAE


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

    def load(self, device: str = "cpu") -> SAE:
        """The SAE, ready for inference."""
        return load_sae(self.folder, device)


@dataclass(frozen=True, repr=False)
class TrainResult(Tabular):
    """The SAEs of a run, in the order of their names.

    Attributes:
        out: The run's folder; the result itself may be given wherever a run's path is asked for.
        saes: At least one.
    """

    out: Path
    saes: tuple[TrainedSAE, ...]

    def __fspath__(self) -> str:
        return str(self.out)

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
        """A row per SAE."""
        columns: dict[str, list[Any]] = {"name": [sae.name or self.out.name for sae in self.saes]}
        for column in ("hook", "kind", "latents", "fvu", "l0", "dead", "tokens"):
            columns[column] = [getattr(sae, column) for sae in self.saes]
        columns["folder"] = [str(sae.folder) for sae in self.saes]
        definitions = {
            "fvu": "Fraction of variance unexplained; 1 is as good as the mean",
            "l0": "Mean number of active latents per token",
            "dead": "Share of latents that are never active",
        }
        return Table(columns, title=f"Training run {self.out}", definitions=definitions)


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
    metrics = known.get("metrics", {})
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
    )
