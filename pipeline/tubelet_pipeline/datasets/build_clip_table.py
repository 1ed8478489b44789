"""The clip table: one row per clip to extract, in the order of the store.

A video gives one clip per window in time and view; its clips are neighbors. Paths are relative to the data set's root,
so that copies of a data set at different places give the same table and the same digest.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from tubelet.errors import TubeletError
from tubelet_pipeline.datasets import folder, kinetics, ssv2
from tubelet_pipeline.datasets.folder import Folder
from tubelet_pipeline.datasets.kinetics import Kinetics
from tubelet_pipeline.datasets.ssv2 import Ssv2
from tubelet_pipeline.sampling import DenseSampling, UniformSampling
from tubelet_pipeline.views import CenterView, ShiftedViews, ThreeCrops, locate, views_per_window
from tubelet_store.clip_table import PLANNED

DatasetConfig = Annotated[Ssv2 | Kinetics | Folder, Field(discriminator="kind")]

_MISSING = b"tubelet.missing_videos"
_OF_VIDEO = ("video_id", "uri", "label", "label_name", "caption", "split")
_ONE_CROP = CenterView()


@dataclass(frozen=True)
class MissingVideos:
    """Annotated videos that do not exist below the root. They fail as `missing` when decoded.

    Attributes:
        count: Number of videos, not clips.
        examples: Paths of the first three.
    """

    count: int
    examples: tuple[str, ...]


def build_clip_table(
    dataset: Ssv2 | Kinetics | Folder,
    sampling: DenseSampling | UniformSampling,
    views: CenterView | ThreeCrops | ShiftedViews = _ONE_CROP,
) -> pa.Table:
    """Clips of `dataset`: `sampling.clips` windows per video, `views` of each; with the planned columns of a store.

    Annotated videos that do not exist keep their rows; `missing_videos` counts them.

    Raises:
        TubeletError: the data set cannot be read as its `kind`, or has no video.
    """
    if isinstance(dataset, Ssv2):
        videos, root = ssv2.list_videos(dataset)
    elif isinstance(dataset, Kinetics):
        videos, root = kinetics.list_videos(dataset)
    else:
        videos, root = folder.list_videos(dataset)
    if not videos:
        raise TubeletError(f"The annotations of {dataset.root} have no video of this split", "Check dataset.split")
    known = set(root.videos)
    # Paths outside the root were not listed; if they are missing, decoding fails.
    absent = [video.uri for video in videos if video.uri not in known and not _is_outside(video.uri)]
    if absent:
        logging.getLogger(__name__).warning(
            "%d of %d annotated videos are not under %s (first: %s)", len(absent), len(videos), root.url, absent[0]
        )
    views_of_video = [vars(locate(views, number)) for number in range(sampling.clips * views_per_window(views))]
    repeated = pa.table(
        {
            "video_id": [video.video_id for video in videos],
            "uri": [video.uri for video in videos],
            "label": [video.label for video in videos],
            "label_name": [video.label_name for video in videos],
            "caption": [video.caption for video in videos],
            "split": [video.split for video in videos],
        },
        schema=pa.schema([PLANNED.field(name) for name in _OF_VIDEO]),
    ).take(np.repeat(np.arange(len(videos)), len(views_of_video)))
    columns = {name: repeated[name] for name in repeated.column_names}
    columns["clip"] = pa.array(np.arange(repeated.num_rows, dtype=np.int64))
    columns["view"] = pa.array(np.tile(np.arange(len(views_of_video), dtype=np.int16), len(videos)))
    for name in views_of_video[0]:
        once = pa.array([view[name] for view in views_of_video], PLANNED.field(name).type)
        columns[name] = once.take(np.tile(np.arange(len(views_of_video)), len(videos)))
    table = pa.table({name: columns[name] for name in PLANNED.names}, schema=PLANNED)
    return table.replace_schema_metadata({_MISSING: json.dumps({"count": len(absent), "examples": absent[:3]})})


def missing_videos(table: pa.Table) -> MissingVideos:
    """Videos of a table by `build_clip_table` that do not exist."""
    missing = json.loads(table.schema.metadata[_MISSING])
    return MissingVideos(missing["count"], tuple(missing["examples"]))


def _is_outside(uri: str) -> bool:
    return uri.startswith("/") or "://" in uri
