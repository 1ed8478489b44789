"""Data sets as configuration: where the videos are, and where it is written what they show."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tubelet.config import Config


class _Videos(Config):
    root: str
    """Folder of the data set: a local path, or a URL such as s3://bucket/ssv2."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many videos, for trials."""


class Ssv2(_Videos):
    """Something-Something v2: {id}.webm or {id}.mp4 in 20bn-something-something-v2/ or in the root."""

    kind: Literal["ssv2"] = "ssv2"
    split: str = "validation"
    """train, validation or test (which has no labels)."""
    annotations: str | None = None
    """Folder of the annotation files, relative to the root; default: found in the root, labels/ or annotations/."""


class Kinetics(_Videos):
    """Kinetics-400, 600 or 700 in any of its usual forms: path lists, the official CSV, or class folders."""

    kind: Literal["kinetics"] = "kinetics"
    split: str = "val"
    """train, val or test."""
    annotations: str | None = None
    """Annotation file, relative to the root; default: the one found there. With none, class folders label."""


class Folder(_Videos):
    """Every video file below a folder, sorted by path."""

    kind: Literal["folder"] = "folder"
    labels: Literal["none", "from_directory"] = "none"
    """from_directory: the name of the directory a video lies in is its class."""


DatasetConfig = Annotated[Ssv2 | Kinetics | Folder, Field(discriminator="kind")]
