"""Configuration of `tubelet evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tubelet_store.config import Config


class EvaluateConfig(Config):
    """One evaluation: a trained SAE, a store, a folder for what comes out."""

    run: Path
    """Folder of a training run, with `sae.json`."""
    store: str
    """Path of the activation store."""
    out: Path | None = None
    """Folder for evaluation.json and report.html; none: `evaluation` inside the run."""
    split: Literal["held_out", "train", "all"] = "held_out"
    """Which videos: those held out of training, those trained on, or both."""
    other_store: bool = False
    """Accept a store other than the one trained on (another data set or sampling); hook and backbone must agree."""
    fit_store: str | None = None
    """Store whose clips probes and maps are fitted on; none: the clips of `store` that the SAE was trained on."""
    fit_clips: int = Field(default=20_000, ge=1)
    """Fit on at most this many clips, evenly spaced."""
    limit_clips: int | None = Field(default=None, ge=1)
    """Evaluate at most this many clips, evenly spaced through the split; none: all of them."""
    lags: int = Field(default=4, ge=1)
    """Largest distance in latent steps of the autocorrelation curve."""
    null_draws: int = Field(default=4, ge=1)
    """Random orders of time behind the shuffled-time null."""
    seed: int = 0
    """Chooses those orders."""
    window_mib: int = Field(default=512, ge=1)
    """Memory for the clips held at once; never less than one clip."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is one."""


class DemoConfig(Config):
    """Size of the demo."""

    out: Path = Path("demo")
    """Folder for videos, stores, run and report."""
    videos: int = Field(default=320, ge=32)
    """Videos to render; three tenths of them are kept for evaluation."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training activations."""
