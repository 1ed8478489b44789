"""Data sets as clip tables: videos, their order and labels.

DatasetConfig (ssv2 | kinetics | folder) ─▶ list of videos ─▶ clip table: one row per video and temporal view
"""

from tubelet_pipeline.datasets.build_clip_table import (
    DatasetConfig,
    MissingVideos,
    build_clip_table,
    missing_videos,
)
from tubelet_pipeline.datasets.dataset_root import resolve_uri
from tubelet_pipeline.datasets.folder import Folder
from tubelet_pipeline.datasets.kinetics import Kinetics
from tubelet_pipeline.datasets.ssv2 import Ssv2

__all__ = [
    "DatasetConfig",
    "Folder",
    "Kinetics",
    "MissingVideos",
    "Ssv2",
    "build_clip_table",
    "missing_videos",
    "resolve_uri",
]
