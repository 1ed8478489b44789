"""One row per latent, a column per statistic: `latents.parquet` in the evaluation's folder.

The gallery's overview and its pages read this table; a column carries its definition in the field's metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tubelet.errors import TubeletError


@dataclass(frozen=True, eq=False)
class LatentColumn:
    """One statistic of every latent.

    Attributes:
        name: `section_quantity`, the column's name.
        values_F: float64 [F], NaN where the statistic is undefined for a latent.
        definition: Formula and conventions, readable alone.
    """

    name: str
    values_F: NDArray[np.float64]
    definition: str


def latent_table(columns: Sequence[LatentColumn], latents: int) -> pa.Table:
    """Table [F rows] of `latent` (int32) and each column; NaN becomes null."""
    fields = [pa.field("latent", pa.int32())]
    arrays = [pa.array(np.arange(latents, dtype=np.int32))]
    for column in columns:
        fields.append(pa.field(column.name, pa.float64(), metadata={"definition": column.definition}))
        arrays.append(pa.array(column.values_F, from_pandas=True))
    return pa.table(arrays, schema=pa.schema(fields))


def write_latents(table: pa.Table, out: Path) -> None:
    """Write `latents.parquet` into the folder `out`."""
    pq.write_table(table, out / "latents.parquet")


def read_latents(folder: Path) -> pa.Table:
    """The table in the evaluation folder `folder`.

    Raises:
        TubeletError: there is none, or it is not a Parquet file.
    """
    path = folder / "latents.parquet"
    if not path.is_file():
        raise TubeletError(f"No latent table at {path}", "Make one with `tubelet evaluate`")
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TubeletError(f"{path} cannot be read: {error}", "Run `tubelet evaluate` again") from error


FILE = "effects.parquet"

_MADE_BY = {b"made_by": b"tubelet evaluate"}

SCHEMA = pa.schema(
    [("latent", pa.int32()), ("target", pa.string()), ("effect", pa.float64()), ("definition", pa.string())],
    metadata=_MADE_BY,
)


@dataclass(frozen=True)
class LatentEffect:
    """One row."""

    latent: int
    target: str
    effect: float
    definition: str


def write_effects(effects: Sequence[LatentEffect], out: Path) -> None:
    """Write the table into the folder `out`; without effects there is none, nor one of an earlier evaluation."""
    path = out / FILE
    if effects:
        rows = [dict(zip(SCHEMA.names, astuple(effect), strict=True)) for effect in effects]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    elif path.is_file() and (pq.read_schema(path).metadata or {}).items() >= _MADE_BY.items():
        path.unlink()
