"""How videos are decoded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tubelet_store.config import Config


class DecodeConfig(Config):
    """Decoder, limits, and number of processes."""

    backend: Literal["auto", "pyav", "decord"] = "auto"
    """All are exact. auto: the fastest on every class of file measured, which is PyAV. pyav: PyAV. decord: decord on
    the files it numbers rightly, PyAV on the others and where decord fails."""
    processes: int = Field(default=2, ge=1)
    """Decode processes per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A clip that takes longer is killed."""
    memory_mb: int = Field(default=2048, ge=128)
    """Limit of private memory per decode process (RLIMIT_DATA), and of the frames of one clip, in MiB."""
