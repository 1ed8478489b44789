"""A small store with real videos, an SAE trained on it, and hostile captions: what gallery tests show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from barcode import ClipSpec, make_clip
from stores import make_plan, planned_table
from tubelet_lens.gallery.config import GalleryConfig
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_trainer.config import HoldoutConfig, TrainConfig
from tubelet_trainer.run.loop import train

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1> \"quoted\" 'too' & \u2028 more"
"""Caption of every clip."""
GRID = (4, 3, 4)
FRAMES = 8
VIDEOS, PER_VIDEO = 14, 2
CROP = (24.0, 16.0, 72.0, 96.0)
"""Top, left, height, width: below the barcode."""


@dataclass(frozen=True)
class Made:
    """Where things lie."""

    root: Path
    store: Store
    x: NDArray[np.float32]
    """[clips, T, S, D] What the store holds."""

    def config(self, out: Path | str, **fields: object) -> GalleryConfig:
        """Settings of a gallery of it, on this machine's processor."""
        given = {"run": self.root / "run", "store": self.store.url, "out": str(out), "device": "cpu", "window_mib": 1}
        given |= {"decode": {"processes": 1}}
        return GalleryConfig.model_validate({**given, **fields})


def make_run(root: Path, keep_patches: int | None = None) -> Made:
    """Videos, a store of two views of each, and a run.

    Args:
        root: Folder for all of it.
        keep_patches: Store so many patches of each clip only.
    """
    # Tiny matrices: more threads would only wait for each other.
    torch.set_num_threads(1)
    (root / "videos").mkdir(parents=True)
    for video in range(VIDEOS):
        make_clip(root / "videos" / f"{video:04d}.webm", ClipSpec(".webm", "libvpx", frames=FRAMES * PER_VIDEO))
    clips, (time, height, width) = VIDEOS * PER_VIDEO, GRID
    rng = np.random.default_rng(0)
    space = keep_patches or height * width
    whole = {"time": time, "height": height, "width": width}
    fields = {}
    if keep_patches:
        fields = {"tokens": {"kind": "patches", "grid": whole, "seed": 0}}
    plan = make_plan(
        clips=clips,
        clips_per_shard=8,
        grid=(time, 1, keep_patches) if keep_patches else GRID,
        hooks={"blocks.1": 8},
        **fields,
    ).model_copy(update={"sampling": {"kind": "dense", "frames": FRAMES, "stride": 1, "clips": PER_VIDEO}})
    shared, own = rng.standard_normal((clips, 1, space, 8)), rng.standard_normal((clips, time, space, 8))
    x = (shared + 0.5 * own).astype(np.float32)
    table = planned_table(clips, PER_VIDEO)
    views = pa.array([clip % PER_VIDEO for clip in range(clips)], pa.int16())
    captions = pa.array([HOSTILE] * clips, pa.string())
    table = table.set_column(table.schema.get_field_index("caption"), table.schema.field("caption"), captions)
    table = table.set_column(table.schema.get_field_index("temporal_view"), table.schema.field("temporal_view"), views)
    writer = StoreWriter.begin(str(root / "s.zarr"), plan, table, {"dataset_root": str(root)})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                first = FRAMES * (clip % PER_VIDEO)
                patches = rng.choice(height * width, space, replace=False) if keep_patches else None
                outcome = ClipOutcome(
                    status="ok",
                    frame_indices=tuple(range(first, first + FRAMES)),
                    timestamps_s=tuple(i / 25 for i in range(first, first + FRAMES)),
                    padded_frames=0,
                    crop=CROP,
                    patches=tuple(sorted(patches.tolist())) if patches is not None else None,
                )
                shard_writer.append(outcome, {"blocks.1": x[clip]})
            shard_writer.commit()
    writer.finish()
    store = open_store(str(root / "s.zarr"))
    settings = {"steps": 60, "batch_tokens": 64, "log_every": 30, "eval_every": 30, "device": "cpu"}
    train(
        TrainConfig.model_validate(
            {
                "store": store.url,
                "out": root / "run",
                "holdout": HoldoutConfig(fraction=0.3),
                "sae": {"k": 2, "expansion": 2},
                **settings,
            }
        )
    )
    return Made(root, store, x)
