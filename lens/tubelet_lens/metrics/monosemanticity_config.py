"""Settings of monosemanticity: embeddings of the evaluated clips by other models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tubelet.config import Config


class _Reference(Config):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """What figures and columns call it, such as `clip`."""
    neutral: bool = False
    """None of the SAEs that are compared reads this model: its figures are the headline."""


class StoreReference(_Reference):
    """A store of the same videos by another backbone; clips are matched by video and view."""

    kind: Literal["store"] = "store"
    store: str
    """Path of the store."""
    hook: str | None = None
    """Its hook; none: the last of its plan."""
    tokens: Literal["grid", "special"] = "grid"
    """grid: the mean of all tokens of the grid. special: the first special token (CLS), its mean through time."""


class ArrayReference(_Reference):
    """Embeddings made elsewhere."""

    kind: Literal["array"] = "array"
    path: Path
    """`.npy` [clips, E], a row for each clip of the evaluated store in the order of its clip table (NaN: none); or
    `.parquet` with columns `video_id`, `embedding` (a list of numbers) and, for more than one view, `view`."""


AnyReference = Annotated[StoreReference | ArrayReference, Field(discriminator="kind")]


class MonosemanticityConfig(Config):
    """Whether the clips on which a latent fires are alike."""

    activation: Literal["max", "mean"] = "max"
    """A clip's activation: the largest or the mean over its tokens."""
    references: tuple[AnyReference, ...] = ()
    """Whose embeddings judge, beside the backbone itself."""
