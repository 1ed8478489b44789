"""Configuration of `tubelet gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tubelet.config import Config
from tubelet_pipeline.decode.process import DecodeConfig


class AllLatents(Config):
    """Every latent that fires."""

    kind: Literal["all"] = "all"


class TopLatents(Config):
    """The first latents by one of their figures."""

    kind: Literal["top"] = "top"
    n: int = Field(default=1000, ge=1)
    """How many."""
    by: str = "frequency"
    """Figure to order by: a column of latents.parquet, or of the gallery's own."""
    lowest: bool = False
    """Take the lowest, not the highest."""


class LatentList(Config):
    """Latents by number."""

    kind: Literal["list"] = "list"
    numbers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Their numbers, from 0."""


class GalleryConfig(Config):
    """One gallery: a trained SAE, a store, a place for the site."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "run",
        "store",
        "out",
        "evaluation",
        "videos",
        "latents",
        "top_clips",
        "split",
        "other_store",
        "limit_clips",
        "device",
    )

    run: Path
    """Folder of a training run, with `sae.json`."""
    store: str
    """Path of the activation store whose clips are shown."""
    out: str | None = None
    """Folder or URL (`s3://...`) of the site; none: `gallery` inside the run."""
    evaluation: Path | None = None
    """Folder that `tubelet evaluate` wrote, for the figures of each latent; none: `evaluation` inside the run, where
    there is one."""
    effects: Path | None = None
    """Table of what edits do (columns latent, target, effect, definition); none: `effects.parquet` in the evaluation,
    where there is one."""
    videos: str | None = None
    """Root of the data set, where it is not where it was when the store was made."""
    split: Literal["held_out", "train", "all"] = "all"
    """Which videos: those held out of training, those trained on, or both."""
    other_store: bool = False
    """Accept a store other than the one trained on (another data set or sampling); hook and backbone must agree."""
    limit_clips: int | None = Field(default=None, ge=1)
    """Look at no more than this many clips, drawn at random; none: all of them."""
    latents: Annotated[AllLatents | TopLatents | LatentList, Field(discriminator="kind")] = AllLatents()
    """Which latents get a page."""
    top_clips: int = Field(default=12, ge=1, le=128)
    """Strongest clips per latent, each of another video."""
    lower_clips: int = Field(default=5, ge=0, le=20)
    """Weaker clips per latent, one from each of so many equal parts of the videos on which it fires."""
    frame_px: int = Field(default=112, ge=16, le=512)
    """Longer side of a picture in pixels; never more than the video has."""
    picture_quality: int = Field(default=60, ge=1, le=100)
    """Quality of the pictures (WebP)."""
    decode: DecodeConfig = DecodeConfig()
    """How videos are read."""
    seed: int = 0
    """Chooses the sample behind the weaker clips."""
    window_mib: int = Field(default=512, ge=1)
    """Memory for the clips, and then for the heat-maps, held at once; never less than one clip, or one latent."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is one."""
