"""A folder of videos as a data set."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

from tubelet.errors import TubeletError
from tubelet_pipeline.datasets.dataset_root import DatasetBase, Root, Video, class_name


class Folder(DatasetBase):
    """Every video file below a folder, sorted by path."""

    kind: Literal["folder"] = "folder"
    labels: Literal["none", "from_directory"] = "none"
    """from_directory: the class of a video is the name of its directory."""


def list_videos(config: Folder) -> tuple[list[Video], Root]:
    """Every video below the root, sorted by path, which is also its id.

    Raises:
        TubeletError: no root, no video, or (labels from_directory) a video directly in the root.
    """
    root = Root(config.root)
    paths = root.require_videos()
    if config.labels == "none":
        return [Video(path, path) for path in paths[: config.limit]], root
    loose = next((path for path in paths if "/" not in path), None)
    if loose is not None:
        raise TubeletError(
            f"{loose} is in no class directory of {root.url}", "Move it into one, or set dataset.labels=none"
        )
    classes = [class_name(str(PurePosixPath(path).parent)) for path in paths]
    number_of = {name: number for number, name in enumerate(sorted(set(classes)))}
    videos = [Video(path, path, number_of[name], name) for path, name in zip(paths, classes, strict=True)]
    return videos[: config.limit], root
