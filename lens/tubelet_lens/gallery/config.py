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
    """The highest (or lowest) latents by one figure."""

    kind: Literal["top"] = "top"
    n: int = Field(default=1000, ge=1)
    """Number of latents."""
    by: str = "frequency"
    """Figure to order by: a column of latents.parquet, or `frequency`, `max_activation`, ... of the gallery itself."""
    lowest: bool = False
    """Take the lowest instead of the highest."""


class LatentList(Config):
    """Latents by number."""

    kind: Literal["list"] = "list"
    numbers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Numbers of the latents, from 0."""


class GalleryConfig(Config):
    """A static site that shows what each latent of an SAE fires on."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "run",
        "store",
        "out",
        "evaluation",
        "videos",
        "latents.kind",
        "latents.numbers",
        "top_clips",
        "split",
        "other_store",
        "limit_clips",
        "device",
    )

    run: Path
    """Folder of a training run, with `sae.json`."""
    store: str
    """Activation store whose clips are shown."""
    out: str | None = None
    """Folder or URL (`s3://...`) of the site; none: `gallery` inside the run."""
    evaluation: Path | None = None
    """Output folder of `tubelet evaluate`, for figures of each latent; none: `evaluation` inside the run, if there."""
    effects: Path | None = None
    """Table of the effects of edits (columns latent, target, effect, definition); none: `effects.parquet` of the
    evaluation, if it exists."""
    videos: str | None = None
    """Folder of the data set, if it has moved since the store was made."""
    split: Literal["held_out", "train", "all"] = "all"
    """Which videos to use: held out of training, trained on, or both."""
    other_store: bool = False
    """Accept a store other than the training store (another data set or sampling) with the same hook and backbone."""
    limit_clips: int | None = Field(default=None, ge=1)
    """Use at most this many clips, drawn at random; none: all of them."""
    latents: Annotated[AllLatents | TopLatents | LatentList, Field(discriminator="kind")] = AllLatents()
    """Which latents get a page."""
    top_clips: int = Field(default=12, ge=1, le=128)
    """Strongest clips per latent, at most one per video."""
    lower_clips: int = Field(default=5, ge=0, le=20)
    """Weaker clips per latent: one from each quantile of the videos on which it fires."""
    frame_px: int = Field(default=112, ge=16, le=512)
    """Longer side of a frame in pixels; at most that of the video."""
    picture_quality: int = Field(default=60, ge=1, le=100)
    """WebP quality of the frames."""
    decode: DecodeConfig = DecodeConfig()
    """Video decoding."""
    seed: int = 0
    """Seed of the sample of weaker clips."""
    window_mib: int = Field(default=512, ge=1)
    """Memory in MiB for the clips or heat-maps processed at once; at least one clip or latent is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is a GPU."""
