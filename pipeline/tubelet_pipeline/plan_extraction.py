"""From a configuration to a plan, which decides every byte of the store, by reading data set and backbone."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, load_backbone
from tubelet_pipeline.datasets import build_clip_table
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.redecode import BACKBONE_FOLDER
from tubelet_pipeline.token_selection import AllTokens, TokenSelector
from tubelet_pipeline.views import ShiftedViews, ThreeCrops, describe_clips
from tubelet_store.clip_table import clip_table_digest
from tubelet_store.plan import Hook, Plan, numpy_dtype

# An S3 object of a few hundred MiB is transferred at full speed and cheap to extract again.
_SHARD_TARGET_BYTES = 256 * 2**20
# Enough shards to share among workers and to lose little in a crash, unless that makes them tiny.
_SHARDS_WANTED = 64
_CLIPS_WANTED = 8

_SOFTWARE = ("tubelet", "torch", "transformers", "av", "decord", "zarr", "numpy", "dask", "pyarrow")


@dataclass(frozen=True)
class Planned:
    """A plan and the clip table it was made for."""

    plan: Plan
    clips: pa.Table
    provenance: dict[str, Any]


def make_plan(config: ExtractConfig) -> Planned:
    """Plan the store of `config`; nothing is written.

    Raises:
        TubeletError: no videos, no such checkpoint or hook, or a number of frames that the backbone does not take.
    """
    clips = build_clip_table(config.dataset, config.sampling, config.views)
    backbone = load_backbone(config.backbone.model_copy(update={"device": "cpu"}), frames=config.sampling.frames)
    check_views(config, backbone)
    selector = TokenSelector(config.tokens, backbone.grid)
    hooks = tuple(dict.fromkeys(backbone.resolve_hook(name) for name in config.hooks))
    plan = Plan(
        # The clip table says which videos, the provenance where they are.
        dataset=config.dataset.model_dump(mode="json", exclude={"root", "annotations"}),
        clip_table=clip_table_digest(clips),
        clips=clips.num_rows,
        clips_per_shard=config.clips_per_shard or _clips_per_shard(config, backbone, selector, clips.num_rows, hooks),
        sampling=describe_clips(config.sampling, config.views, backbone.tubelet_frames),
        preprocessing=backbone.describe_preprocessing(),
        backbone=backbone.describe(),
        grid=selector.grid,
        tokens=selector.selection,
        hooks=tuple(Hook(name=name, channels=backbone.channels(name)) for name in hooks),
        special_tokens=backbone.special_tokens,
        special_time=backbone.special_time,
        dtype=config.dtype,
    )
    provenance: dict[str, Any] = {
        "dataset_root": str(config.dataset.root),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": software_versions(),
    }
    folder = Path(config.backbone.id).expanduser()
    if folder.is_dir():
        provenance[BACKBONE_FOLDER] = str(folder.resolve())
    return Planned(plan, clips, provenance)


def software_versions() -> dict[str, str]:
    """Versions of the libraries that can change the activations."""
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def check_views(config: ExtractConfig, backbone: Backbone) -> None:
    """Refuse views that the backbone's grid or the preprocessing does not allow.

    Raises:
        TubeletError: all crops would be equal, a shift is as large as the grid, or shifted views are to be stored with
            only some of their tokens.
    """
    views, grid = config.views, backbone.grid
    if isinstance(views, ThreeCrops) and backbone.preprocessing.resize_to is not None:
        raise TubeletError(
            f"'{backbone.checkpoint.name}' resizes every frame to a fixed size, so there is no longer side to crop "
            "along",
            "Set views.kind: center, or backbone.preprocessing with shortest_edge and crop",
        )
    if not isinstance(views, ShiftedViews):
        return
    for field, shift, most in (
        ("patches", views.patches, min(grid.height, grid.width)),
        ("tubelets", views.tubelets, grid.time),
    ):
        if shift >= most:
            raise TubeletError(
                f"Views shifted by {shift} {field} have no token in common: the grid is "
                f"{grid.time}x{grid.height}x{grid.width}",
                f"Set views.{field} to less than {most}",
            )
    if not isinstance(config.tokens, AllTokens):
        raise TubeletError(
            "Shifted views are compared token by token, so every token must be stored", "Set tokens.kind: all"
        )


def _clips_per_shard(
    config: ExtractConfig, backbone: Backbone, selector: TokenSelector, clips: int, hooks: tuple[str, ...]
) -> int:
    widest = max(backbone.channels(name) for name in hooks)
    clip_bytes = selector.grid.tokens * widest * numpy_dtype(config.dtype).itemsize
    by_size = max(1, _SHARD_TARGET_BYTES // clip_bytes)
    by_number = max(_CLIPS_WANTED, math.ceil(clips / _SHARDS_WANTED))
    return min(by_size, by_number, clips)
