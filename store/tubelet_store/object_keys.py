"""Names of the objects of a store. All other names of the format are in `format`, `clip_table` and `moments`."""

from __future__ import annotations

GROUP = "zarr.json"
PLAN_TABLE = "plan.parquet"
CLIPS = "clips.parquet"
MANIFEST = "manifest.parquet"
COMMITS = "commits"
ACTIVATIONS = "activations"
SPECIAL = "special_tokens"
MOMENTS = "moments"

DIMENSIONS = ("clip", "time", "space", "channel")
SPECIAL_DIMENSIONS = ("clip", "time", "token", "channel")


def shard_key(kind: str, hook: str, shard: int) -> str:
    """Key of the object that holds shard `shard` of `kind` (ACTIVATIONS or SPECIAL) at `hook`."""
    return f"{kind}/{hook}/c/{shard}/0/0/0"


def commit_key(shard: int) -> str:
    """Key of a shard's commit record."""
    return f"{COMMITS}/{shard:06d}.json"


def commit_moments_key(shard: int) -> str:
    """Key of the moments that a shard's commit record refers to."""
    return f"{COMMITS}/{shard:06d}.moments.safetensors"
