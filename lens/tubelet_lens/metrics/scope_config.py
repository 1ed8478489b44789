"""Settings of information scope."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tubelet.config import Config


class ScopeConfig(Config):
    """Whether a latent follows the content when the view shifts."""

    store: str | None = None
    """Store with shifted views (`views.kind: shifted` when extracting), same backbone and hook; none: the evaluated
    store, if it has such views."""
    clips: int = Field(default=32, ge=1)
    """Strongest clips per latent, k_CDS."""
    vanished: Literal["left_out", "one"] = "left_out"
    """What a pair counts in which the latent fires in one view only: nothing, or the largest distance."""
    limit_pairs: int | None = Field(default=None, ge=1)
    """Look at no more than this many pairs of views, drawn at random; none: all of them."""
