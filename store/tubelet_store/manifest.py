"""The manifest: one row per object that makes up a finished store, and the digest that is the store's identity.

The commit records, the planned table and the group document are not in it: they say how the store came to be, not what
it holds. The plan's digest is, so what is measured and what it means are identified together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tubelet_store.clips import from_parquet, to_parquet
from tubelet_store.commit import StoredObject
from tubelet_store.plan import Plan

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("crc32c", pa.list_(pa.uint32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """The objects of a finished store, by key."""

    objects: tuple[StoredObject, ...]
    plan_digest: str

    @classmethod
    def of(cls, objects: Iterable[StoredObject], plan: Plan) -> Manifest:
        """Manifest of `objects`, sorted by key."""
        return cls(tuple(sorted(objects, key=lambda stored: stored.key)), plan.digest)

    @property
    def identity(self) -> str:
        """`sha256:` over the plan's digest and a line `key size_bytes sha256` per object."""
        lines = [self.plan_digest, *(f"{o.key} {o.size_bytes} {o.sha256}" for o in self.objects)]
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_parquet(self) -> bytes:
        """The manifest as Parquet bytes."""
        rows: Sequence[dict[str, object]] = [stored.model_dump() for stored in self.objects]
        columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in SCHEMA]
        return to_parquet(pa.table(columns, schema=SCHEMA))

    @classmethod
    def from_parquet(cls, data: bytes, plan_digest: str) -> Manifest:
        """Inverse of `to_parquet`."""
        rows = from_parquet(data).to_pylist()
        return cls(tuple(StoredObject(**{**row, "crc32c": tuple(row["crc32c"])}) for row in rows), plan_digest)
