"""How videos are decoded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tubelet.config import Config


class DecodeConfig(Config):
    """Decoder, limits, and number of processes."""

    backend: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """All are exact. auto: by the project's measurements, which is PyAV. pyav: PyAV. decord, torchcodec: that one on
    the files it numbers rightly, PyAV on the others and where it fails."""
    processes: int = Field(default=2, ge=1)
    """Decode processes per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A clip that takes longer is killed."""
    memory_mb: int = Field(default=2048, ge=128)
    """Limit of private memory per decode process (RLIMIT_DATA), of the frames of one clip, and of a remote video, in
    MiB."""
