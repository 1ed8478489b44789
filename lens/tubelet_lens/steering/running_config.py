"""What `tubelet evaluate` measures in the running backbone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tubelet.config import Config
from tubelet_pipeline.decode.config import DecodeConfig


class RunningConfig(Config):
    """The backbone run again on the videos, with its activations reconstructed or edited."""

    root: str | None = None
    """Folder of the data set; none: where each store says it was."""
    checkpoint: str | None = None
    """Hub id or folder of the backbone; none: what the store calls it."""
    fit_clips: int = Field(default=256, ge=2)
    """Clips to fit probes on, at most, of all classes in turn."""
    test_clips: int = Field(default=64, ge=1)
    """Clips to measure on, at most, of all classes in turn; their pixels are held in memory."""
    largest: int = Field(default=64, ge=1)
    """Ablation: most latents taken away at once."""
    draws: int = Field(default=20, ge=1)
    """Ablation: random sets of latents per size."""
    strengths: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 1.0, 2.0, 4.0), min_length=1)
    """Edits of a class: f' = -strength x the latent's largest activation; figures are of the one nearest to 2."""
    control_draws: int = Field(default=2, ge=1)
    """Edits of a class: random latents, matched latents and random directions per class and strength."""
    effects: int = Field(default=32, ge=0)
    """Latents switched off one by one, the most important to the probe first, for `effects.parquet`, which the gallery
    shows; each takes two passes over the test clips; 0: none."""
    masks: Literal["color", "shape", "object"] = "color"
    """Classes of patches, where the data set has masks as `tubelet videos` writes them."""
    max_frequency: float = Field(default=0.1, gt=0, le=1)
    """Segmentation: latents that fire on more of the tokens are not looked at. [RECON]"""
    label_threshold: float = Field(default=0.9, ge=0, le=1)
    """Segmentation: patches of which the commonest class covers less are left out. [RECON]"""
    decode: DecodeConfig = DecodeConfig(processes=1)
    """Decoder and its limits."""
