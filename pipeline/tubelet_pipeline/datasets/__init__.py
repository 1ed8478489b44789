"""Data sets as clip tables: which videos, in which order, with which labels.

DatasetConfig (ssv2 | kinetics | folder) ─▶ list of videos ─▶ clip table: one row per video and temporal view
"""

from tubelet_pipeline.datasets.build_clip_table import MissingVideos, build_clip_table, missing_videos
from tubelet_pipeline.datasets.config import DatasetConfig, Folder, Kinetics, Ssv2
from tubelet_pipeline.datasets.dataset_root import resolve_uri

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
