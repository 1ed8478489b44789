"""The objects of a finished store, one row each. The digest of the manifest is the store's identity.

Commit records, planned table and group document are not listed: they describe how the store was made, not its contents.
The plan's digest is part of the identity.

A manifest stays an Arrow table, and its rows become objects one by one: a store of 100 TB has some 300,000 of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc

from tubelet_store.clip_table import from_parquet, to_parquet
from tubelet_store.commit import KEY_PATTERN, StoredObject
from tubelet_store.plan import Plan

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("crc32c", pa.list_(pa.uint32()), nullable=False),
    ]
)

_ROWS_AT_ONCE = 4096


class Manifest(Sequence[StoredObject]):
    """The objects of a finished store, in the order of their keys."""

    def __init__(self, table: pa.Table, plan_digest: str) -> None:
        self._table = table.combine_chunks()
        self.plan_digest = plan_digest

    @classmethod
    def of(cls, objects: Iterable[StoredObject], plan: Plan) -> Manifest:
        """Manifest of `objects`, sorted by key."""
        rows = ManifestRows()
        rows.add(objects)
        return rows.manifest(plan)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> StoredObject: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[StoredObject]: ...
    def __getitem__(self, index: int | slice) -> StoredObject | Sequence[StoredObject]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return next(_objects(self._table.slice(row, 1)))

    def __iter__(self) -> Iterator[StoredObject]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from _objects(self._table.slice(start, _ROWS_AT_ONCE))

    @property
    def objects(self) -> tuple[StoredObject, ...]:
        """All of them at once."""
        return tuple(self)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of the objects, in order."""
        return tuple(self._table["key"].to_pylist())

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def get(self, key: str) -> StoredObject | None:
        """The object called `key`, None where the store has none."""
        row = self._rows.get(key)
        return None if row is None else self[row]

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return int(pc.sum(self._table["size_bytes"]).as_py() or 0)

    @cached_property
    def identity(self) -> str:
        """`sha256:` over the plan's digest and a line `key size_bytes sha256` per object."""
        columns = (self.keys, self._table["size_bytes"].to_pylist(), self._table["sha256"].to_pylist())
        lines = [self.plan_digest, *(f"{key} {size} {sha256}" for key, size, sha256 in zip(*columns, strict=True))]
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_parquet(self) -> bytes:
        """The manifest as Parquet bytes."""
        return to_parquet(self._table)

    @classmethod
    def from_parquet(cls, data: bytes, plan_digest: str) -> Manifest:
        """Inverse of `to_parquet`.

        Raises:
            ValueError: a value is null, or a key leaves the store.
            KeyError: a column is missing.
            pyarrow.ArrowException: the bytes are no Parquet file of such columns.
        """
        table = from_parquet(data).select(SCHEMA.names).cast(SCHEMA)
        if any(column.null_count for column in table.columns):
            raise ValueError("a value is null")
        safe = pc.match_substring_regex(table["key"], KEY_PATTERN)
        if not pc.all(safe, min_count=0).as_py():
            raise ValueError(f"the key {table['key'].filter(pc.invert(safe))[0].as_py()!r} leaves the store")
        return cls(table, plan_digest)


class ManifestRows:
    """Builds a manifest from the objects of one shard after the other, in little more memory than the result takes."""

    def __init__(self) -> None:
        self._objects: list[StoredObject] = []
        self._pieces = [SCHEMA.empty_table()]

    def add(self, objects: Iterable[StoredObject]) -> None:
        """Take `objects` in."""
        for stored in objects:
            self._objects.append(stored)
            if len(self._objects) == _ROWS_AT_ONCE:
                self._to_arrow()

    def manifest(self, plan: Plan) -> Manifest:
        """Manifest of all that was taken in, sorted by key."""
        self._to_arrow()
        return Manifest(pa.concat_tables(self._pieces).sort_by("key"), plan.digest)

    def _to_arrow(self) -> None:
        columns = [[getattr(stored, field.name) for stored in self._objects] for field in SCHEMA]
        self._pieces.append(pa.table([pa.array(c, type=f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA))
        self._objects.clear()


def _objects(table: pa.Table) -> Iterator[StoredObject]:
    for row in table.to_pylist():
        # The schema has checked the types; checking again object by object would take most of the time.
        yield StoredObject.model_construct(**{**row, "crc32c": tuple(row["crc32c"])})
