"""Kinetics as a data set, in each of its common forms.

train.csv (SlowFast, VideoMAE)               "path label" or "path,label", split from the right: paths hold spaces
kinetics400_train_list_videos.txt (mmaction2) "class/file.mp4 label", below videos_train/
official CSV                                  label,youtube_id,time_start,time_end,split; {id}_{start:06d}_{end:06d}.mp4
no annotation file                            class folders, numbered in sorted order
"""

from __future__ import annotations

import csv
import re
from pathlib import PurePosixPath
from typing import Literal

from tubelet.errors import TubeletError, nearest
from tubelet_pipeline.datasets.dataset_root import DatasetBase, Root, Video, class_name, relative_uri, stem

_ALIASES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
_LIST_ROW = re.compile(r"(?P<path>.*[^\s,])[\s,]+(?P<label>-?\d+)")


class Kinetics(DatasetBase):
    """Kinetics-400, 600 or 700 as path lists, with the official CSV, or as class folders."""

    kind: Literal["kinetics"] = "kinetics"
    split: str = "val"
    """train, val or test."""
    annotations: str | None = None
    """Annotation file, relative to the root. None: the one in the root; without one, class folders give the labels."""


def list_videos(config: Kinetics) -> tuple[list[Video], Root]:
    """Videos of `config.split`, in the order of the annotations, or sorted by path if there are only class folders.

    Raises:
        TubeletError: unknown split; no root, annotation file or video; several annotation files; a malformed row.
    """
    split = next((name for name, aliases in _ALIASES.items() if config.split in aliases), None)
    if split is None:
        raise TubeletError(f"Kinetics has no split '{config.split}'", nearest(config.split, sum(_ALIASES.values(), ())))
    root = Root(config.root)
    root.require_videos()
    path = config.annotations or _find_annotations(root, split)
    if path is None:
        videos = _from_folders(root, split)
    else:
        lines = root.read_text(path).splitlines()
        if not any(line.strip() for line in lines):
            raise TubeletError(f"{path} is empty", "Set dataset.annotations to the file of the split")
        official = "youtube_id" in lines[0]
        videos = (_from_official if official else _from_list)(root, path, lines, split)
    return videos[: config.limit], root


def _find_annotations(root: Root, split: str) -> str | None:
    names = "|".join(_ALIASES[split])
    pattern = re.compile(
        rf"(annotations/|labels/)?((kinetics|k)[-_]?(400|600|700)?(_2020)?[-_])?({names})(_list_videos|_list)?\.(csv|txt)"
    )
    matching = [path for path in root.files if pattern.fullmatch(path)]
    if len(matching) > 1:
        raise TubeletError(
            f"Several annotation files for split '{split}' under {root.url}: {', '.join(matching)}",
            "Set dataset.annotations to one of them",
        )
    return matching[0] if matching else None


def _from_list(root: Root, path: str, lines: list[str], split: str) -> list[Video]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _LIST_ROW.fullmatch(line.strip())
        if row is None:
            raise TubeletError(f"{path}, line {number}: '{line.strip()}' is not 'path label'", "Fix or remove the line")
        rows.append((relative_uri(root.url, row["path"]), int(row["label"])))
    # Paths are relative to the root, or to the split's folder, which mmaction2 has in its own configuration.
    known = set(root.videos)
    prefixes = ["", *(f"{base}{alias}/" for alias in _ALIASES[split] for base in ("", "videos_"))]
    prefix = max(prefixes, key=lambda prefix: sum(f"{prefix}{uri}" in known for uri, _ in rows))
    folders: dict[int, set[str]] = {}
    for uri, label in rows:
        folders.setdefault(label, set()).add(str(PurePosixPath(uri).parent))
    # Folders name the classes only if each class has its own.
    named = all(len(names) == 1 for names in folders.values()) and len(
        {class_name(next(iter(names))) for names in folders.values()} - {""}
    ) == len(folders)
    return [
        Video(
            video_id=stem(uri),
            uri=uri if uri.startswith("/") or "://" in uri else f"{prefix}{uri}",
            label=label if label >= 0 else None,
            label_name=class_name(str(PurePosixPath(uri).parent)) if named else None,
            split=split,
        )
        for uri, label in rows
    ]


def _from_official(root: Root, path: str, lines: list[str], split: str) -> list[Video]:
    rows = csv.DictReader(lines)
    have = rows.fieldnames or []
    for field in ("youtube_id", "time_start", "time_end"):
        if field not in have:
            raise TubeletError(f"{path} has no column '{field}' (columns: {', '.join(have)})", "Use the official CSV")
    kept = []
    names = set()
    for row in rows:
        try:
            clip = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (TypeError, ValueError):
            raise TubeletError(
                f"{path}, line {rows.line_num}: '{lines[rows.line_num - 1]}' has no whole time_start and time_end",
                "Fix or remove the line",
            ) from None
        name = row.get("label") or None
        # Numbered over the whole file, so that all splits of a file have the same numbers.
        if name is not None:
            names.add(name)
        if (row.get("split") or split) in _ALIASES[split]:
            kept.append((clip, name))
    number_of = {name: number for number, name in enumerate(sorted(names))}
    return [
        Video(
            video_id=clip,
            uri=root.by_stem.get(clip, f"{clip}.mp4"),
            label=number_of[name] if name is not None else None,
            label_name=name,
            split=split,
        )
        for clip, name in kept
    ]


def _from_folders(root: Root, split: str) -> list[Video]:
    bases = [f"{base}{alias}/" for alias in _ALIASES[split] for base in ("", "videos_")]
    in_split = [path for path in root.videos if path.startswith(tuple(bases))]
    others = {base for aliases in _ALIASES.values() for alias in aliases for base in (f"{alias}/", f"videos_{alias}/")}
    if not in_split and any(path.startswith(tuple(others)) for path in root.videos):
        raise TubeletError(
            f"No annotation file and no folder for split '{split}' under {root.url}",
            f"Looked for {', '.join(f'{alias}.csv' for alias in _ALIASES[split])}, lists like "
            f"kinetics400_{split}_list_videos.txt, and folders {', '.join(bases)}",
        )
    chosen = in_split or root.videos
    loose = next((path for path in chosen if len(PurePosixPath(path).parts) < (3 if in_split else 2)), None)
    if loose is not None:
        raise TubeletError(
            f"{loose} is in no class folder, and there is no annotation file for split '{split}' under {root.url}",
            "Set dataset.annotations, or dataset.kind=folder for videos without labels",
        )
    names = sorted({class_name(str(PurePosixPath(path).parent)) for path in chosen})
    number_of = {name: number for number, name in enumerate(names)}
    return [
        Video(stem(path), path, number_of[name], name, split=split)
        for path in chosen
        for name in [class_name(str(PurePosixPath(path).parent))]
    ]
