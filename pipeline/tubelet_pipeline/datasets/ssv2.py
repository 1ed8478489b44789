"""Something-Something v2 as a data set.

Rows are {id, label (caption), template, placeholders}; the class is labels[template without "[" and "]"], a number as
text.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from tubelet.errors import TubeletError, nearest
from tubelet_pipeline.datasets.dataset_root import DatasetBase, Root, Video

SPLITS = ("train", "validation", "test")
_VIDEO_FOLDER = "20bn-something-something-v2/"


class Ssv2(DatasetBase):
    """Something-Something v2: {id}.webm or {id}.mp4 in 20bn-something-something-v2/ or in the root."""

    kind: Literal["ssv2"] = "ssv2"
    split: str = "validation"
    """train, validation or test (which has no labels)."""
    annotations: str | None = None
    """Folder of the annotation files, relative to the root. None: the root, labels/ or annotations/."""


def list_videos(config: Ssv2) -> tuple[list[Video], Root]:
    """Videos of `config.split`, in annotation order.

    Raises:
        TubeletError: unknown split; no root, annotation file or video; a row without id, or of an unknown class.
    """
    if config.split not in SPLITS:
        raise TubeletError(f"SSv2 has no split '{config.split}'", nearest(config.split, SPLITS))
    root = Root(config.root)
    root.require_videos()
    path, rows = _read(root, config, config.split)
    if not isinstance(rows, list):
        raise TubeletError(f"{path} is not a list of videos", "Use the file as TwentyBN or Qualcomm ship it")
    labels: dict[str, Any] = {}
    labels_path = ""
    if config.split != "test":
        labels_path, labels = _read(root, config, "labels")
    at = {path.removeprefix(_VIDEO_FOLDER): path for path in root.videos}
    videos = []
    for number, row in enumerate(rows[: config.limit]):
        if not isinstance(row, dict) or "id" not in row:
            raise TubeletError(f"{path}: entry {number} has no 'id'", "Use the file as TwentyBN or Qualcomm ship it")
        video_id = str(row["id"])
        label = name = None
        if config.split != "test":
            name = str(row.get("template", "")).replace("[", "").replace("]", "")
            try:
                label = int(labels[name])
            except (KeyError, TypeError, ValueError):
                raise TubeletError(
                    f"{path}: entry {number} (id {video_id}) has the template '{name}', not in {labels_path}",
                    nearest(name, labels),
                ) from None
        uri = at.get(f"{video_id}.webm") or at.get(f"{video_id}.mp4") or f"{_VIDEO_FOLDER}{video_id}.webm"
        videos.append(Video(video_id, uri, label, name, row.get("label"), config.split))
    return videos, root


def _read(root: Root, config: Ssv2, name: str) -> tuple[str, Any]:
    folders = (
        [config.annotations.rstrip("/") + "/"] if config.annotations is not None else ["", "labels/", "annotations/"]
    )
    candidates = [f"{folder}{prefix}{name}.json" for folder in folders for prefix in ("something-something-v2-", "")]
    for path in candidates:
        outside = path.startswith("/") or "://" in path
        if not outside and path not in root.files:
            continue
        try:
            return path, json.loads(root.read_text(path))
        except json.JSONDecodeError as error:
            raise TubeletError(f"{path}, line {error.lineno}: not JSON ({error.msg})", "Download it again") from error
        except TubeletError:
            continue
    raise TubeletError(
        f"No SSv2 annotations for '{name}' under {root.url}; looked for {', '.join(candidates)}",
        "Put the annotation files there, or set dataset.annotations to their folder",
    )
