"""What `tubelet videos` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tubelet.config import Config


class VideosConfig(Config):
    """The demo data set."""

    out: Path
    """Folder of the data set; made if it is missing. A run that was stopped continues where it was."""
    videos: int = Field(240, ge=1)
    """How many videos. Classes are balanced when it is a multiple of 16; a larger number only adds videos."""
    seed: int = Field(0, ge=0)
    """Seed of every random choice."""
    layout: Literal["ssv2", "kinetics"] = "ssv2"
    """ssv2: VP9 webm files, JSON labels. kinetics: H.264 mp4 files in class folders, CSV labels."""
    frames: int = Field(48, ge=8, le=4096)
    """Frames of each video."""
    fps: int = Field(12, ge=1, le=120)
    """Frames per second."""
    height: int = Field(128, ge=32, le=2160, multiple_of=2)
    """Pixels."""
    width: int = Field(128, ge=32, le=3840, multiple_of=2)
    """Pixels."""
    validation_share: float = Field(0.3, ge=0, le=1)
    """Share of each class that goes to the validation split."""
    test_share: float = Field(0.0, ge=0, le=1)
    """Share of each class that goes to the test split, which in SSv2's layout has no labels."""
    workers: int | None = Field(None, ge=1)
    """Processes that render; null: one per core."""

    @model_validator(mode="after")
    def _shares_fit(self) -> VideosConfig:
        if self.validation_share + self.test_share > 1:
            raise ValueError("validation_share and test_share together are more than 1")
        return self

    def fixed(self) -> dict[str, object]:
        """The fields that decide what a video of this data set is; they cannot change between runs into one folder."""
        return self.model_dump(mode="json", exclude={"out", "videos", "workers"})
