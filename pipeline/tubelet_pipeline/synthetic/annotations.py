"""Folders and annotation files in the layout of the real data sets, so that the same readers work.

SSv2                                         Kinetics
20bn-something-something-v2/{id}.webm        {train,val,test}/{class name}/{youtube_id}_{start:06d}_{end:06d}.mp4
labels/{train,validation,test,labels}.json   annotations/{train,val,test}.csv
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tubelet_pipeline.synthetic.actions import TEMPLATES, class_name, fill

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Entry:
    """What the annotation files say about one video."""

    index: int
    seed: int
    split: Split
    template: str
    placeholders: tuple[str, ...]
    duration_s: float

    @property
    def caption(self) -> str:
        """The template with its placeholders filled."""
        return fill(self.template, list(self.placeholders))


class Layout(ABC):
    """Paths of the videos, and their annotation files."""

    suffix: str
    """Of the video files."""

    @abstractmethod
    def video_id(self, entry: Entry) -> str:
        """Id of the video, unique in the data set; also the name of its mask file."""

    @abstractmethod
    def video_path(self, entry: Entry) -> Path:
        """Path of the video file below the data set's folder."""

    @abstractmethod
    def annotations(self, entries: Sequence[Entry]) -> dict[Path, str]:
        """Text of every annotation file, by its path below the data set's folder."""


class SSv2(Layout):
    """Something-Something v2 as Qualcomm distributes it."""

    suffix = ".webm"

    def video_id(self, entry: Entry) -> str:
        """Numbered from 1, as in SSv2."""
        return str(entry.index + 1)

    def video_path(self, entry: Entry) -> Path:
        """All videos lie in one folder."""
        return Path("20bn-something-something-v2") / f"{self.video_id(entry)}{self.suffix}"

    def annotations(self, entries: Sequence[Entry]) -> dict[Path, str]:
        """Four JSON files; labels.json maps the template without brackets to a number, as a string."""
        files: dict[str, object] = {"labels": {class_name(t): str(i) for i, t in enumerate(TEMPLATES)}}
        for split in SPLITS:
            files[split] = [self._record(entry) for entry in entries if entry.split == split]
        return {Path("labels") / f"{name}.json": json.dumps(tree, indent=1) + "\n" for name, tree in files.items()}

    def _record(self, entry: Entry) -> dict[str, object]:
        if entry.split == "test":
            return {"id": self.video_id(entry)}
        return {
            "id": self.video_id(entry),
            "label": entry.caption,
            "template": entry.template,
            "placeholders": list(entry.placeholders),
        }


class Kinetics(Layout):
    """Kinetics with one folder per class and the official CSV columns."""

    suffix = ".mp4"
    columns = ("label", "youtube_id", "time_start", "time_end", "split")
    names: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}  # noqa: RUF012

    def video_id(self, entry: Entry) -> str:
        """An 11-character id, which may begin with a dash as real ones do, and the clip's seconds in its source."""
        youtube_id, start_s, end_s = self._source(entry)
        return f"{youtube_id}_{start_s:06d}_{end_s:06d}"

    def video_path(self, entry: Entry) -> Path:
        """Class folders have spaces in their names."""
        return Path(self.names[entry.split]) / self._label(entry) / f"{self.video_id(entry)}{self.suffix}"

    def annotations(self, entries: Sequence[Entry]) -> dict[Path, str]:
        """One CSV file per split."""
        files = {}
        for split, name in self.names.items():
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(self.columns)
            for entry in entries:
                if entry.split == split:
                    writer.writerow([self._label(entry), *self._source(entry), name])
            files[Path("annotations") / f"{name}.csv"] = text.getvalue()
        return files

    def _label(self, entry: Entry) -> str:
        return class_name(entry.template).lower()

    def _source(self, entry: Entry) -> tuple[str, int, int]:
        digest = hashlib.sha256(f"{entry.seed}/{entry.index}".encode()).digest()
        start_s = digest[-1]
        youtube_id = base64.urlsafe_b64encode(digest)[:11].decode()
        return youtube_id, start_s, start_s + max(1, round(entry.duration_s))


LAYOUTS: dict[Literal["ssv2", "kinetics"], Layout] = {"ssv2": SSv2(), "kinetics": Kinetics()}


def split_of(nth: int, shares: dict[Split, float]) -> Split:
    """Split of the `nth` video of a class: at every step the split that is furthest below its share.

    So classes are balanced in each split of any prefix of the data set, and twins, both the nth of their classes, are
    in the same split. With few videos per class a share can only be met to the nearest whole video.
    """
    counts = dict.fromkeys(SPLITS, 0)
    chosen: Split = "train"
    for step in range(1, nth + 2):
        chosen = max(SPLITS, key=lambda split: shares[split] * step - counts[split])
        counts[chosen] += 1
    return chosen


def write_annotations(root: Path, layout: Layout, entries: Sequence[Entry]) -> None:
    """Write every annotation file below `root`, each replaced in one step."""
    for path, text in layout.annotations(entries).items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
