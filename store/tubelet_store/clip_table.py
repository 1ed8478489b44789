"""The clip table: the videos of a store, and the outcome of each.

planned columns (before extraction) ──▶ plan.parquet
planned + outcome columns (after)   ──▶ clips.parquet, one row per clip, in array order
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from itertools import islice
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from tubelet.config import Config
from tubelet.errors import TubeletError

PLANNED = pa.schema(
    [
        pa.field("clip", pa.int64(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("label_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("split", pa.string()),
        pa.field("view", pa.int16(), nullable=False),
        pa.field("temporal_view", pa.int16()),
        pa.field("spatial_view", pa.int16()),
        pa.field("shift_patches", pa.int16()),
        pa.field("shift_tubelets", pa.int16()),
    ]
)

OUTCOME = pa.schema(
    [
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("frame_indices", pa.list_(pa.int32())),
        pa.field("timestamps_s", pa.list_(pa.float64())),
        pa.field("fps", pa.float64()),
        pa.field("video_frames", pa.int32()),
        pa.field("padded_frames", pa.int16()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("crop", pa.list_(pa.float32())),
        pa.field("patches", pa.list_(pa.int32())),
        pa.field("decoder", pa.string()),
        pa.field("truncated", pa.bool_()),
        pa.field("corrupt_frames", pa.int32()),
    ]
)

SHARD = pa.field("shard", pa.int32(), nullable=False)

FINISHED = pa.schema([*PLANNED, *OUTCOME, SHARD])

_ROWS_AT_ONCE = 4096


class ClipOutcome(Config):
    """What became of one clip."""

    status: Literal["ok", "failed"]
    error: str | None = None
    """`code: message` where the clip failed."""
    frame_indices: tuple[int, ...] | None = None
    """Frames used, in display order, counted from 0."""
    timestamps_s: tuple[float, ...] | None = None
    """Presentation time of each frame."""
    fps: float | None = None
    video_frames: int | None = None
    """Frames in the whole video."""
    padded_frames: int | None = Field(default=None, ge=0)
    """Frames that repeat another because the video is too short."""
    width: int | None = None
    height: int | None = None
    crop: tuple[float, float, float, float] | None = None
    """Top, left, height, width of what the backbone saw, in source pixels."""
    patches: tuple[int, ...] | None = None
    """Patches that are stored, ascending, where the plan keeps only some of each clip."""
    decoder: str | None = None
    truncated: bool | None = None
    """The stream ends well before the duration in its container."""
    corrupt_frames: int | None = None
    """Frames the decoder flagged as damaged."""

    @classmethod
    def failure(cls, code: str, message: str) -> ClipOutcome:
        """A clip that could not be stored."""
        return cls(status="failed", error=f"{code}: {message}")


def check_planned(table: pa.Table) -> pa.Table:
    """`table` with exactly the planned columns; those that may be null may also be absent.

    Raises:
        TubeletError: it is empty, or a column is missing or of another type.
    """
    if table.num_rows == 0:
        raise TubeletError("The clip table is empty", "Check the data set's root, split and limit")
    try:
        return completed(table, PLANNED).cast(PLANNED)
    except (KeyError, pa.ArrowInvalid) as error:
        raise TubeletError(f"The clip table does not fit: {error}", f"It needs {', '.join(PLANNED.names)}") from error


def completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, in its order; nullable ones that an older Tubelet did not write are null.

    Raises:
        KeyError: a column that may not be null is missing.
    """
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names)


def finished_table(planned: pa.Table, outcomes: Iterable[ClipOutcome], clips_per_shard: int) -> pa.Table:
    """`planned` rows with their outcomes, which come in the same order, and shard numbers."""
    source, pieces = iter(outcomes), [OUTCOME.empty_table()]
    # Outcomes are a hundred times larger than their rows: few of them exist at a time.
    while some := list(islice(source, _ROWS_AT_ONCE)):
        columns = [pa.array([getattr(outcome, field.name) for outcome in some], type=field.type) for field in OUTCOME]
        pieces.append(pa.table(columns, schema=OUTCOME))
    outcome = pa.concat_tables(pieces).combine_chunks()
    shards = pa.array(planned["clip"].to_numpy() // clips_per_shard, type=SHARD.type)
    return pa.table([*completed(planned, PLANNED).columns, *outcome.columns, shards], schema=FINISHED)


def outcomes_of(finished: pa.Table) -> list[ClipOutcome]:
    """Inverse of `finished_table`: the outcome of each row."""
    return [ClipOutcome.model_validate(row) for row in finished.select(OUTCOME.names).to_pylist()]


def clip_table_digest(planned: pa.Table) -> str:
    """`sha256:` over clip numbers, video ids, paths, labels and views: what a plan calls its clip table by."""
    digest = hashlib.sha256()
    names = ("clip", "video_id", "uri", "label", "view")
    for some in planned.select(names).to_batches(max_chunksize=_ROWS_AT_ONCE):
        for row in zip(*(column.to_pylist() for column in some.columns), strict=True):
            digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def to_parquet(table: pa.Table) -> bytes:
    """The table as Parquet bytes; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    _release_memory()
    return sink.getvalue()


def from_parquet(data: bytes) -> pa.Table:
    """Inverse of `to_parquet`. Without Arrow's thread pools: the tables are small, and start-up and exit stay quick."""
    table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
    _release_memory()
    return table


def _release_memory() -> None:
    # Arrow keeps what it freed: of 100,000 clips five times their table, until the driver exits.
    pa.default_memory_pool().release_unused()
