"""Small stores for tests, written by the real writer from given or random activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tubelet_store.clip_table import PLANNED, ClipOutcome
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.storage import open_root
from tubelet_store.storage.local import LocalRoot
from tubelet_store.store_writer import StoreWriter


def planned_table(clips: int, clips_per_video: int = 1) -> pa.Table:
    """A planned clip table: `clips_per_video` views of video-0000, video-0001, ..., four labels in turn."""
    videos = [clip // clips_per_video for clip in range(clips)]
    rows = {
        "clip": list(range(clips)),
        "video_id": [f"video-{v:04d}" for v in videos],
        "uri": [f"videos/{v:04d}.webm" for v in videos],
        "label": [v % 4 for v in videos],
        "label_name": [f"action {v % 4}" for v in videos],
        "caption": [f"caption of {v}" for v in videos],
        "split": ["train"] * clips,
        "view": [clip % clips_per_video for clip in range(clips)],
    }
    return pa.table({name: rows.get(name, [None] * clips) for name in PLANNED.names}, schema=PLANNED)


def make_plan(
    clips: int = 10,
    clips_per_shard: int = 4,
    grid: tuple[int, int, int] = (4, 3, 5),
    hooks: dict[str, int] | None = None,
    dtype: Any = "float16",
    **fields: Any,
) -> Plan:
    """A plan with made-up backbone and data set."""
    return Plan(
        dataset={"kind": "folder", "name": "test"},
        clip_table="sha256:test",
        clips=clips,
        clips_per_shard=clips_per_shard,
        sampling={"kind": "dense", "frames": 2 * grid[0], "stride": 1},
        preprocessing={},
        backbone={"family": "random", "id": "none"},
        grid=Grid(time=grid[0], height=grid[1], width=grid[2]),
        hooks=tuple(Hook(name=name, channels=channels) for name, channels in (hooks or {"blocks.1": 8}).items()),
        dtype=dtype,
        **fields,
    )


def make_store(
    path: Path,
    plan: Plan | None = None,
    activations: dict[str, np.ndarray] | None = None,
    failed: Sequence[int] = (),
    seed: int = 0,
    clips_per_video: int = 1,
    table: pa.Table | None = None,
) -> Store:
    """A finished store at `path`.

    Args:
        path: Where to write it.
        plan: Default: `make_plan()`.
        activations: Per hook float32 [clips, time, space, channel]; default: standard normal.
        failed: Clips to store as failed.
        seed: Of the random activations.
        clips_per_video: Views per video.
        table: Clip table; default: `planned_table`.
    """
    plan = plan or make_plan()
    rng = np.random.default_rng(seed)
    if activations is None:
        activations = {
            hook.name: rng.standard_normal((plan.clips, *plan.clip_shape(hook)), dtype=np.float32)
            for hook in plan.hooks
        }
    special = {hook.name: rng.standard_normal((plan.clips, *plan.special_shape(hook))) for hook in plan.hooks}
    table = planned_table(plan.clips, clips_per_video) if table is None else table
    writer = StoreWriter.begin(str(path), plan, table, {"made_by": "tests"})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                if clip in failed:
                    shard_writer.append(ClipOutcome.failure("open_failed", "broken on purpose"))
                    continue
                patches = None if plan.position_grid == plan.grid else tuple(range(plan.grid.space))
                frames = tuple(range(2 * plan.grid.time))
                outcome = ClipOutcome(status="ok", frame_indices=frames, padded_frames=0, patches=patches)
                tokens = {name: values[clip] for name, values in activations.items()}
                tail = {name: values[clip] for name, values in special.items()} if plan.special_tokens else None
                shard_writer.append(outcome, tokens, tail)
            shard_writer.commit()
    writer.finish()
    return open_store(str(path))


def upload(store: Store, url: str) -> str:
    """Put every object of a local store below `url`, past the code that copies stores; gives `url`."""
    root = open_root(url)
    for key in LocalRoot(Path(store.url)).list_keys():
        root.replace(key, store.root.read(key))
    return url
