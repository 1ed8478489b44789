"""Data sets as clip tables: which videos, in which order, with which labels.

DatasetConfig (ssv2 | kinetics | folder) ─▶ list of videos ─▶ clip table: one row per video and temporal view
"""

from tubelet_pipeline.clips.dataset import DatasetConfig, Folder, Kinetics, Ssv2
from tubelet_pipeline.clips.root import resolve_uri
from tubelet_pipeline.clips.table import MissingVideos, build_clip_table, missing_videos

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
