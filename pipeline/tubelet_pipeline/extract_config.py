"""Configuration of `tubelet extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tubelet.config import Config, validate
from tubelet_pipeline.backbones.pretrained import BackboneConfig
from tubelet_pipeline.cluster import ClusterConfig
from tubelet_pipeline.datasets import DatasetConfig
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import Sampling
from tubelet_pipeline.token_selection import AllTokens, Tokens
from tubelet_pipeline.views import CenterView, Views
from tubelet_store.spool import UploadConfig


class ExtractConfig(Config):
    """One extraction: videos, frames, activations and the store."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "dataset.kind",
        "dataset.root",
        "dataset.split",
        "sampling.kind",
        "sampling.frames",
        "sampling.stride",
        "backbone.id",
        "hooks",
        "store",
        "dtype",
        "tokens.kind",
        "batch_size",
        "cluster.workers",
        "cluster.scheduler",
    )

    dataset: DatasetConfig
    """Videos and labels."""
    sampling: Sampling
    """Which frames of a video form a clip."""
    backbone: BackboneConfig
    """The frozen model."""
    hooks: tuple[str, ...] = Field(min_length=1)
    """Hooks whose activations are stored, from one forward pass: `blocks.3`, `blocks.-1`, `final_norm`, ..."""
    store: str
    """Path or fsspec URL of the store. An unfinished store with the same plan is continued."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the stored activations: float16 is more precise, bfloat16 has a larger range."""
    clips_per_shard: int | None = Field(default=None, ge=1)
    """Clips per shard, the unit of work. None: 256 MiB per hook, or less if that makes few shards."""
    views: Views = CenterView()
    """Crops and shifted windows of each clip."""
    tokens: Tokens = AllTokens()
    """Which tokens are stored."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Clips per forward pass. auto: the largest power of two that fits the device, measured before the first shard."""
    decode: DecodeConfig = DecodeConfig()
    """Decoder, its processes and limits."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers."""
    scheduler: str | None = None
    """Short for cluster.scheduler."""
    scheduler_file: Path | None = None
    """Short for cluster.scheduler_file."""
    upload: UploadConfig = UploadConfig()
    """Behavior while object storage is unreachable."""
    log: Path | None = None
    """Machine-readable log, one JSON object per line. None: `STORE.log.jsonl` next to a local store, else none."""

    @property
    def workers_from(self) -> ClusterConfig:
        """The `cluster` section, with the short fields merged in.

        Raises:
            TubeletError: they exclude each other.
        """
        short = {"scheduler": self.scheduler, "scheduler_file": self.scheduler_file}
        given = {name: value for name, value in short.items() if value is not None}
        if not given:
            return self.cluster
        tree = self.cluster.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        # The command line overrides the file: one way to a scheduler replaces the other, and a cluster to start.
        for name in ("scheduler", "scheduler_file", "class", "kwargs", "workers", "adapt"):
            tree.pop(name, None)
        return validate(ClusterConfig, {**tree, **given}, "the command line")

    @property
    def log_path(self) -> Path | None:
        """Path of the machine-readable log."""
        if self.log is not None or "://" in self.store:
            return self.log
        return Path(f"{self.store.rstrip('/')}.log.jsonl").expanduser()
