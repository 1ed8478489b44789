"""What editing single latents does to classes: `effects.parquet` beside an evaluation, a row per latent and target.

    latent      number
    target      what it acts on: a class's name
    effect      how much
    definition  what was done and measured, readable alone

The gallery shows the table on the latents' pages. One that was made elsewhere has the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
