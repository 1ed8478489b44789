"""Configuration of `tubelet edit`, and of what `tubelet evaluate` measures in the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tubelet.config import Config
from tubelet_lens.steering.operations import Operation, Region, Suppress
from tubelet_pipeline.decode.process import DecodeConfig


class ChangeConfig(Config):
    """One latent, the operation on it, and where."""

    latent: int = Field(ge=0)
    """Number of the latent to edit."""
    operation: Operation = Suppress()
    """Operation on its activation f."""
    where: Region = Region()
    """Part of the clip to edit."""


class EditConfig(ChangeConfig):
    """Edits of SAE latents in the running backbone, on some clips."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "run",
        "store",
        "latent",
        "operation.kind",
        "operation.strength",
        "videos",
        "clips",
        "root",
        "controls",
        "out",
        "device",
    )

    run: Path
    """Folder of a training run, with `sae.json`."""
    store: str
    """Store of the same backbone. It defines how videos are sampled, how strongly latents fire, and the classes."""
    videos: tuple[str, ...] = ()
    """Video files (paths or URLs)."""
    clips: tuple[int, ...] = ()
    """Clips of the store, by number; their videos are decoded again."""
    also: tuple[ChangeConfig, ...] = ()
    """Further edits, made together with the first."""
    root: str | None = None
    """Folder of the store's data set; none: the folder recorded in the store."""
    checkpoint: str | None = None
    """Hub id or folder of the backbone; none: the one recorded in the store."""
    downstream: tuple[Path, ...] = ()
    """Runs of SAEs on later hooks of the same backbone, to report which of their latents change."""
    probe_clips: int = Field(default=256, ge=0)
    """If the checkpoint has no classifier, fit a probe on at most this many labeled clips; 0: no probe."""
    usage_clips: int = Field(default=64, ge=1)
    """Clips of the store on which each latent's largest activation is measured."""
    controls: int = Field(default=16, ge=1)
    """Number of matched latents, and of random directions, to compare with."""
    seed: int = 0
    """Seed of the controls."""
    out: Path | None = None
    """Folder for edit.json and edit.html; none: `edits/latent-N` inside the run."""
    decode: DecodeConfig = DecodeConfig(processes=1)
    """Video decoding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is a GPU."""

    @model_validator(mode="after")
    def _check_clips(self) -> EditConfig:
        if not self.videos and not self.clips:
            raise ValueError("give videos or clips to edit")
        return self

    @property
    def report_folder(self) -> Path:
        """Path of the page."""
        return self.out if self.out is not None else self.run / "edits" / f"latent-{self.latent}"

    @property
    def changes(self) -> tuple[ChangeConfig, ...]:
        """All edits, in order."""
        return (ChangeConfig(latent=self.latent, operation=self.operation, where=self.where), *self.also)
