"""A store whose content is a function of the clip number, so that any process writes the same bytes of any shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from stores import make_plan, planned_table
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.store_writer import StoreWriter

PLAN = make_plan(
    clips=10, clips_per_shard=4, grid=(2, 2, 3), hooks={"blocks.1": 4, "blocks.3": 6}, special_tokens=("cls",)
)
FAILED, NONFINITE = 3, 6


def begin(url: str) -> StoreWriter:
    return StoreWriter.begin(url, PLAN, planned_table(PLAN.clips), {"made_by": "tests"})


def write_shard(writer: StoreWriter, shard: int) -> None:
    with writer.shard(shard) as shard_writer:
        for clip in PLAN.shard_range(shard):
            if clip == FAILED:
                shard_writer.append(ClipOutcome.failure("open_failed", "on purpose"))
                continue
            rng = np.random.default_rng(clip)
            tokens = {
                hook.name: rng.standard_normal(PLAN.clip_shape(hook), dtype=np.float32) * (1 + clip)
                for hook in PLAN.hooks
            }
            special = {hook.name: rng.standard_normal(PLAN.special_shape(hook)) for hook in PLAN.hooks}
            if clip == NONFINITE:
                tokens["blocks.3"][0, 0, :2] = np.nan, np.inf
            outcome = ClipOutcome(status="ok", frame_indices=(0, 2, 4, 6), timestamps_s=(0.0, 0.1, 0.2, 0.3), fps=10.0)
            shard_writer.append(outcome, tokens, special)
        shard_writer.commit()


def write_all(url: str) -> None:
    writer = begin(url)
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.finish()


def fingerprint(path: Path) -> dict[str, str]:
    """Digest of every file of a store; of commit records without their timing, of the group without its provenance."""
    digests = {}
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        key, data = file.relative_to(path).as_posix(), file.read_bytes()
        if key == "zarr.json" or (key.startswith("commits/") and key.endswith(".json")):
            document = json.loads(data)
            document.pop("seconds", None)
            document.get("attributes", {}).get("tubelet", {}).pop("provenance", None)
            data = json.dumps(document).encode()
        digests[key] = hashlib.sha256(data).hexdigest()
    return digests
