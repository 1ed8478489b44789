"""A store of random float16 tokens, written by the real writer: what the benchmarks of readers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tubelet_store.clip_table import PLANNED, ClipOutcome
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter


def random_store(folder: Path, grid: Grid, hook: Hook, clips: int, clips_per_shard: int) -> Store:
    """A finished store at `folder`; no two clips hold the same tokens at the same place."""
    plan = Plan(
        dataset={"kind": "random"},
        clip_table="sha256:benchmark",
        clips=clips,
        clips_per_shard=clips_per_shard,
        sampling={},
        preprocessing={},
        backbone={},
        grid=grid,
        hooks=(hook,),
    )
    columns = {
        "clip": list(range(clips)),
        "video_id": [f"video-{clip}" for clip in range(clips)],
        "uri": [f"{clip}.mp4" for clip in range(clips)],
        "view": [0] * clips,
    }
    table = pa.table({name: columns.get(name, [None] * clips) for name in PLANNED.names}, schema=PLANNED)
    writer = StoreWriter.begin(str(folder), plan, table, {})
    tokens = np.random.default_rng(0).standard_normal((grid.time, grid.space, hook.channels), dtype=np.float32)
    outcome = ClipOutcome(status="ok", frame_indices=tuple(range(2 * grid.time)), padded_frames=0)
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                # Shifted, not drawn again: drawing takes longer than writing.
                shard_writer.append(outcome, {hook.name: np.roll(tokens, clip)})
            shard_writer.commit()
    writer.finish()
    return open_store(str(folder))
